"""The hub on the command line: BASE and ADAPTER by id, `verify --against hub`, `export --push`, and no token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import hub_environment
from hub_server import Hub
from shell import Answer, environment, gora, gora_here, snapshot

from gora_serve.adapter.factors import Adapter, BaseId
from gora_serve.integrity.manifest import hash_model
from gora_serve.training.export import export_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

TOKEN = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm012345"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def base(hub: Hub, tiny_base: Path) -> str:
    """The tiny base at org/tiny; its commit."""
    return hub.add("org/tiny", {path.name: path.read_bytes() for path in tiny_base.iterdir()})


@pytest.fixture
def adapter(tiny_adapter: Adapter, tiny_base: Path, tmp_path: Path) -> Path:
    bound = Adapter(tiny_adapter.modules, BaseId("org/tiny", "0" * 40, hash_model(tiny_base).roots))
    return export_adapter(bound, tmp_path / "adapter").folder


@pytest.fixture
def login(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    hub.tokens.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


def publish(hub: Hub, folder: Path, name: str = "org/adapter") -> str:
    return hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})


def done(*words: object) -> Answer:
    answer = gora_here(*words)
    assert answer.code == 0, answer.err
    return answer


# BASE


def test_hash_of_a_base_at_a_commit(hub: Hub, base: str, tiny_base: Path) -> None:
    told = json.loads(done("hash", "org/tiny@main", "--json").out)
    assert told["weights_root"] == hash_model(tiny_base).roots.weights
    assert base in told["base"]
    assert told["source"] == {"repo_id": "org/tiny", "revision": base}
    assert f"org/tiny at commit {base}" in done("hash", "org/tiny@main").out


def test_plan_fetches_the_json_files_alone(hub: Hub, base: str) -> None:
    done("plan", f"org/tiny@{base}", "--memory", "4")
    assert all(path.endswith(".json") for _, path, _ in hub.requests("GET", "/resolve/"))


def test_a_fetch_draws_no_bar_among_events(hub: Hub, base: str, adapter: Path, tmp_path: Path) -> None:
    env = environment(**hub_environment(hub, tmp_path / "fresh"))
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    told = gora("serve", "org/tiny@main", "-a", f"x={adapter}", "--dry-run", "--log-format", "json", env=env)
    assert told.code == 0, told.err
    assert [json.loads(line)["event"] for line in told.err.splitlines()] == ["adapter verified"]


def test_the_commit_is_recorded(hub: Hub, base: str, tiny_data: Path, tmp_path: Path) -> None:
    """In the run, in the adapter's binding and in its configuration; the id is without the branch."""
    small = ("--probe-steps", "1", "--batch-size", "2", "--max-length", "32", "--rank", "2", "--steps", "1")
    done("fit", "org/tiny@main", "--data", tiny_data, "--output", tmp_path / "run", "--gamma", "0.1", *small)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["base"]["name"], run["base"]["revision"]) == ("org/tiny", base)
    done("export", tmp_path / "run", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", base)
    assert f"org/tiny at {base}" in (tmp_path / "out" / "README.md").read_text()
    done("verify", tmp_path / "out", "--base", f"org/tiny@{base}", "--strict")


def test_a_damaged_download_ends_with_1(hub: Hub, base: str) -> None:
    hub.faults.flip.add(SHARD)
    answer = gora_here("hash", "org/tiny@main")
    assert (answer.code, answer.gs) == (1, "GS-105")
    hub.faults.flip.clear()
    Path(str(answer.field("file"))).unlink()
    done("hash", "org/tiny@main")


@pytest.mark.parametrize("name", ["org/../tiny@main", "org/tiny@../x", "org/tiny@", "@main", "a/b/c@main"])
def test_malformed_ids(hub: Hub, name: str) -> None:
    for words in (("hash", name), ("verify", name), ("verify", name, "--against", "hub")):
        answer = gora_here(*words)
        assert (answer.code, answer.gs, answer.out) == (2, "GS-261", ""), words
    assert hub.asked == []


# ADAPTER


def test_verify_an_adapter_by_id(hub: Hub, base: str, adapter: Path) -> None:
    commit = publish(hub, adapter)
    told = json.loads(done("verify", "org/adapter@main", "--base", "org/tiny@main", "--json").out)
    assert told["verified"]
    assert commit in told["path"]
    answer = gora_here("verify", "org/adapter")
    assert (answer.code, answer.gs) == (5, "GS-503"), "without a revision it is a path"


def test_verify_an_adapter_that_was_edited_on_the_hub(hub: Hub, adapter: Path) -> None:
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    hub.add("org/adapter", files | {"adapter_config.json": files["adapter_config.json"] + b" "})
    answer = gora_here("verify", "org/adapter@main")
    assert (answer.code, answer.gs) == (1, "GS-102")


def test_convert_and_gap_take_an_id(hub: Hub, base: str, adapter: Path, tmp_path: Path) -> None:
    publish(hub, adapter)
    words = ("org/adapter@main", "--base", "org/tiny@main", "--from", "lora")
    done("convert", *words, "--output", tmp_path / "converted")
    done("gap", *words)
    done("verify", tmp_path / "converted", "--base", "org/tiny@main")


def test_serve_takes_ids(hub: Hub, base: str, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the plan; the base is served by the name that its id has, not by the commit."""
    from gora_serve.config import ServeConfig
    from gora_serve.serving import start

    commit = publish(hub, adapter)
    monkeypatch.setattr(start, "find_engine", lambda: SimpleNamespace(device="cpu", version="0.32.0"))
    named = [("a", Path("org/adapter@main"))]
    plan, warnings = start.prepare("org/tiny@main", named, ServeConfig(), strict=True)
    assert (plan.models, warnings) == (("tiny", "a"), [])
    assert plan.base.name == base
    assert [served.source.name for served in plan.adapters if served.source] == [commit]
    assert start.prepare("org/tiny@main", named, ServeConfig(served_name="x"))[0].models == ("x", "a")
    hub.faults.flip.add("adapter_model.safetensors")
    publish(hub, adapter, "org/bad")
    answer = gora_here("serve", "org/tiny@main", "-a", "a=org/bad@main", "--dry-run")
    assert (answer.code, answer.gs) == (1, "GS-105")


# verify --against hub


def test_against_hub(hub: Hub, base: str, tiny_base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    before = snapshot(copy)
    answer = done("verify", copy, "--against", "hub", "--repo", "org/tiny@main")
    assert f"verified: {len(before)} files here are as the hub has them" in answer.out
    assert base in answer.out
    assert SHARD in answer.out
    (copy / "config.json").write_text("{}")
    (copy / SHARD).unlink()
    (copy / "[red]x").write_text("")
    answer = gora_here("verify", copy, "--against", "hub", "--repo", "org/tiny@main")
    assert (answer.code, answer.gs) == (1, "GS-125")
    assert answer.field("file") == str(copy / "config.json")
    assert "differs" in answer.out
    assert "missing" in answer.out
    assert "[red]x" in answer.out
    told = json.loads(gora_here("verify", copy, "--against", "hub", "--repo", "org/tiny@main", "--json").out)
    assert not told["verified"]
    assert {f["path"]: f["state"] for f in told["files"] if f["state"] != "equal"} == {
        "config.json": "differs", SHARD: "missing", "[red]x": "extra",
    }  # fmt: skip
    assert not hub.requests("GET", "/resolve/")


def test_against_hub_by_id(hub: Hub, base: str) -> None:
    answer = gora_here("verify", "org/tiny@main", "--against", "hub")
    assert (answer.code, answer.gs) == (5, "GS-552")
    done("hash", "org/tiny@main")
    done("verify", "org/tiny@main", "--against", "hub")


def test_verify_a_base_by_id_against_a_manifest(hub: Hub, base: str, tmp_path: Path) -> None:
    done("hash", "org/tiny@main", "--output", tmp_path / "m.json")
    done("verify", "org/tiny@main", "--manifest", tmp_path / "m.json")


@pytest.mark.parametrize(
    "words",
    [
        ("--repo", "org/tiny"), ("--against", "hub", "--base", "b"), ("--against", "hub", "--manifest", "m"),
        ("--against", "hub", "--strict"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(hub: Hub, tiny_base: Path, words: tuple[str, ...]) -> None:
    assert (gora_here("verify", tiny_base, *words).code, hub.asked) == (2, [])


# export --push


def test_push_and_pull(hub: Hub, base: str, login: str, adapter: Path, tmp_path: Path) -> None:
    answer = done("export", adapter, "--output", tmp_path / "out", "--push", "org/mine")
    commit = hub.repos["org/mine"].refs["main"]
    assert f"commit {commit}" in answer.out
    assert f"{hub.url}/org/mine/commit/{commit}" in answer.out
    assert "private" in answer.out
    done("verify", f"org/mine@{commit}", "--base", "org/tiny@main", "--strict")
    done("verify", tmp_path / "out", "--against", "hub", "--repo", f"org/mine@{commit}")
    words = ("--output", tmp_path / "out", "--overwrite", "--push", "org/open", "--public", "--json")
    told = json.loads(done("export", adapter, *words).out)
    assert told["pushed"]["commit"] == hub.repos["org/open"].refs["main"]
    assert (told["pushed"]["private"], told["pushed"]["verified"]) == (False, True)


def test_push_that_fails(hub: Hub, login: str, adapter: Path, tmp_path: Path) -> None:
    hub.faults.deny["/commit/"] = 403
    answer = gora_here("export", adapter, "--output", tmp_path / "out", "--push", "org/mine")
    assert (answer.code, answer.gs) == (5, "GS-553")
    assert answer.field("kept") == f"the adapter is complete in {tmp_path / 'out'}"
    done("verify", tmp_path / "out")
    hub.faults.deny.clear()
    done("export", adapter, "--output", tmp_path / "out", "--overwrite", "--push", "org/mine")


@pytest.mark.parametrize("words", [("--push", "org/name@main"), ("--push", "../x"), ("--push", ""), ("--public",)])
def test_push_to_what_is_no_repository(hub: Hub, adapter: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    answer = gora_here("export", adapter, "--output", tmp_path / "out", *words)
    assert answer.code == 2
    assert not (tmp_path / "out").exists()
    assert hub.asked == []


# Tokens


def has_token(answer: Answer, folder: Path) -> list[str]:
    """Where the token is: in what was printed, or in a file below the folder (the login itself apart)."""
    found = [name for name, text in (("out", answer.out), ("err", answer.err)) if TOKEN in text]
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "token")
    return found + [str(path) for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("more", [(), ("--json",), ("--debug",), ("--debug", "--json")])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 412])
def test_no_token_is_printed(
    hub: Hub, login: str, base: str, adapter: Path, tmp_path: Path, more: tuple[str, ...], status: int
) -> None:
    """The server refuses everything, and repeats the token that it was sent in body and headers."""
    hub.faults.echo = True
    hub.faults.deny["/"] = status
    for number, words in enumerate(
        [
            ("hash", "org/tiny@main"), ("verify", "org/adapter@main"),
            ("verify", adapter, "--against", "hub", "--repo", "org/adapter@main"),
            ("export", adapter, "--output", tmp_path / "out", "--overwrite", "--push", "org/mine"),
        ]
    ):  # fmt: skip
        asked = len(hub.asked)
        answer = gora_here(*words, *more)
        assert answer.code == 5, (number, answer.err)
        assert len(hub.asked) > asked
        assert "you sent" in answer.err
        assert "<token>" in answer.err
        assert has_token(answer, tmp_path) == []
        assert ("Traceback" in answer.err) == ("--debug" in more)


# In processes of their own, told by the environment alone


def env_of(hub: Hub, folder: Path, **more: str) -> Mapping[str, str]:
    return environment(**{**hub_environment(hub, folder), **more})


def test_in_a_process_of_its_own(hub: Hub, base: str, adapter: Path, tmp_path: Path) -> None:
    """Endpoint, cache, login file and offline mode as users set them; with HF_DEBUG nothing tells the token."""
    hub.tokens.add(TOKEN)
    (tmp_path / "hub-home").mkdir()
    (tmp_path / "hub-home" / "token").write_text(TOKEN)
    env = env_of(hub, tmp_path, HF_DEBUG="1")
    answer = gora("export", adapter, "--output", tmp_path / "out", "--push", "org/mine", env=env)
    assert answer.code == 0, answer.err
    assert has_token(answer, tmp_path) == []
    hub.faults.echo = True
    hub.faults.deny["/org/mine"] = 403
    answer = gora("--debug", "verify", "org/mine@main", env=env)
    assert (answer.code, answer.gs) == (5, "GS-521")
    assert "<token>" in answer.err
    assert has_token(answer, tmp_path) == []
    hub.faults.deny.clear()
    assert gora("verify", "org/mine@main", "--base", "org/tiny@main", env=env).code == 0
    offline = env_of(hub, tmp_path, HF_HUB_OFFLINE="1")
    asked = len(hub.asked)
    assert gora("verify", "org/mine@main", "--base", "org/tiny@main", env=offline).code == 0
    answer = gora("hash", "org/other@main", env=offline)
    assert (answer.code, answer.gs) == (5, "GS-521")
    assert "HF_HUB_OFFLINE is set" in str(answer.field("try"))
    answer = gora("verify", "org/tiny@main", "--against", "hub", env=offline)
    assert (answer.code, answer.gs) == (5, "GS-551")
    assert len(hub.asked) == asked
