"""A real vLLM whose adapters come, change and go under load. PEFT in float32 says whether each answer was right.

One server is started for all of this file; its tests run in their order.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from serving.corpus import CORPUS, write_sound
from serving.traffic import Asked, Running, Traffic, Version, distances, serving

from gora_serve.errors import RunError
from gora_serve.integrity.headers import read_header
from gora_serve.serving.client import complete, list_models
from gora_serve.serving.inside import ROUTE
from gora_serve.serving.process import session_members

pytestmark = [
    pytest.mark.e2e,
    # torch and its dependents warn about their own deprecated calls while they are imported and while PEFT is at work.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TOLERANCE = 1e-4
RANKS = {"fixed": 4, "a1": 8, "a2": 2, "b": 16, "a3": 8}  # as PEFT knows them
BROKEN = ("init pissa", "NaN", "another width", "wrong module path", "rank above the configuration's", "cut off")


@dataclass
class Scene:
    """The server, its directory, the adapters by PEFT's names for them, and what was asked and seen so far."""

    server: Running
    live: Path
    made: Path
    base: Path
    prompts: tuple[tuple[int, ...], ...]
    versions: dict[str, list[Version]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def drop(self, known: str, name: str) -> float:
        """Put a version into the directory, in place of another one; return the time before."""
        begun = time.monotonic()
        shutil.copytree(self.made / known, self.live / f".{known}")
        if (self.live / name).exists():
            (self.live / name).rename(self.live / ".old")
        (self.live / f".{known}").rename(self.live / name)
        shutil.rmtree(self.live / ".old", ignore_errors=True)
        return begun

    def swap(self, known: str, name: str, count: int) -> None:
        """Replace a version under load, and wait until the new one is served."""
        begun = self.drop(known, name)
        seen = self.server.wait(f"a new version is served: {name}", count)
        *before, last = self.versions[name]
        self.versions[name] = [*before, Version(last.known, last.since, seen), Version(known, begun)]


@pytest.fixture(scope="module")
def scene(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A server with one adapter of the command line, and a directory with a good one and a bad one."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("live")
    base, live, made = smollm2, folder / "adapters", folder / "made"
    header = read_header(base / "model.safetensors")
    ends = ("q_proj", "v_proj", "down_proj")
    shapes: Any = {n.removesuffix(".weight"): e.shape for n, e in header.entries.items() if n[:-7].endswith(ends)}
    for seed, (known, rank) in enumerate(RANKS.items()):
        write_sound(made / known, shapes, seed=seed, rank=rank)
    live.mkdir()
    shutil.copytree(made / "a1", live / "a")
    CORPUS[0].build(made / "b", live / "bad")
    tokenizer = AutoTokenizer.from_pretrained(base)
    long = "Once upon a time there was a small village at the foot of a mountain. " * 9  # a block of the KV cache
    texts = ("The capital of France is", long)
    prompts = tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)
    words = ("-a", f"fixed={made / 'fixed'}", "--adapters", str(live), "--store", str(folder / "store"))
    words += ("--max-rank", "16", "--max-adapters", "4", "--", "--lora-target-modules", *ends)  # less to compute
    with serving(base, folder, *words) as server:
        server.wait("ready:")
        versions = {"base": [Version(None)], "fixed": [Version("fixed")], "a": [Version("a1")], "b": [Version("b")]}
        yield Scene(server, live, made, base, prompts, versions)


def test_what_lay_there_at_the_start_is_served(scene: Scene) -> None:
    assert list_models(scene.server.url) == ("base", "fixed", "a")
    assert "a" in scene.server.lines("ready:")[0]
    scene.server.wait("refused: bad:")
    assert "GS-383" in scene.server.lines("refused: bad:")[0]


def test_under_load_adapters_come_change_and_go(scene: Scene) -> None:
    """No request fails. Whether each answer is right is the next test's question."""
    server, live = scene.server, scene.live
    with Traffic(server.url, ["base", "fixed", "a"], scene.prompts, workers=4) as traffic:
        traffic.after(8)
        scene.drop("b", "b")
        server.wait("served: b:")
        traffic.models.append("b")
        traffic.after(12)
        for row in CORPUS:
            if row.name in BROKEN:
                row.build(scene.made / "a2", live / f"bad-{row.code.lower()}")
        scene.swap("a2", "a", 1)
        traffic.after(12)
        for row in CORPUS:
            if row.name in BROKEN:
                server.wait(f"refused: bad-{row.code.lower()}:")
        scene.swap("a3", "a", 2)
        traffic.after(12)
        traffic.without("b")
        shutil.rmtree(live / "b")
        server.wait("withdrawn: b")
        traffic.after(4)
    server.wait("unloaded: b")
    server.wait("unloaded: a", 2)
    scene.asked = traffic.asked
    assert [one.error for one in scene.asked if one.error] == []
    assert len(scene.asked) > 48
    assert list_models(server.url) == ("base", "fixed", "a")
    with pytest.raises(RunError, match="HTTP 404"):
        complete(server.url, "b", [1, 2, 3], 1)


def test_every_answer_was_that_of_its_own_adapter(scene: Scene, record_property: Any) -> None:
    import torch

    from gora_serve.training.reference import Reference

    assert scene.asked, "the test before has asked"
    reference = Reference(scene.base, {known: scene.made / known for known in RANKS}, torch.float32)
    found = distances(scene.asked, scene.versions, reference.logprobs)
    record_property("largest difference", max(found))
    assert max(found) < TOLERANCE
    crossed = {name: [Version("a2")] for name in scene.versions}
    others = [one for one in scene.asked if one.model != "a"][:4]
    assert min(distances(others, crossed, reference.logprobs)) > 100 * TOLERANCE, "the comparison can fail"
    before = {**scene.versions, "a": [Version("a1")]}
    after = [one for one in scene.asked if one.model == "a" and one.begun > scene.versions["a"][1].until][:4]
    assert after
    assert min(distances(after, before, reference.logprobs)) > 100 * TOLERANCE, "nothing of an old version is left"


def test_the_openai_package_and_curl(scene: Scene) -> None:
    import openai

    with openai.OpenAI(base_url=f"{scene.server.url}/v1", api_key="none", timeout=120) as client:
        assert [model.id for model in client.models.list()] == ["base", "fixed", "a"]
        answers = {}
        for model in ("base", "fixed", "a"):
            asked = {"model": model, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0.0}
            whole = client.completions.create(**asked).choices[0].text
            pieces = client.completions.create(**asked, stream=True)
            assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole
            url = f"{scene.server.url}/v1/completions"
            header = "Content-Type: application/json"
            command = ["curl", "--silent", "--fail", "--noproxy", "*", url, "-H", header, "-d", json.dumps(asked)]
            done = subprocess.run(command, capture_output=True, check=True)
            assert json.loads(done.stdout)["choices"][0]["text"] == whole
            answers[model] = whole
        assert len(set(answers.values())) == 3
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="b", prompt="x", max_tokens=1)


def test_the_example_client(scene: Scene) -> None:
    script = Path(__file__).parents[2] / "examples" / "client.py"
    command = [sys.executable, str(script), "Hello", "--max-tokens", "4", "--url"]
    done = subprocess.run([*command, scene.server.url], capture_output=True, text=True, check=True)
    assert [name for name in ("base", "fixed", "a") if f"│ {name} " in done.stdout] == ["base", "fixed", "a"]
    nobody = subprocess.run([*command, "http://127.0.0.1:9"], capture_output=True, text=True, check=False)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.startswith("http://127.0.0.1:9: ")


def test_nobody_else_can_load_or_unload(scene: Scene) -> None:
    path = str(scene.made / "b")
    for route, body in (
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ("/adapters", {"name": "x", "src": path}),
        (ROUTE, {"do": "withdraw", "name": "a"}),
        (ROUTE, {"do": "try", "name": "x", "path": path, "alias": "x"}),
    ):
        request = urllib.request.Request(
            scene.server.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        with caught.value as err:
            assert err.code == 403
    assert list_models(scene.server.url) == ("base", "fixed", "a")


def test_it_ends_and_leaves_nothing_behind(scene: Scene) -> None:
    engines = [int(pid) for pid in Path(f"/proc/{scene.server.process.pid}/task").iterdir() for pid in _children(pid)]
    assert engines
    scene.server.process.send_signal(signal.SIGTERM)
    assert scene.server.process.wait(timeout=60) == 143
    assert [member for engine in engines for member in session_members(engine)] == []


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()
