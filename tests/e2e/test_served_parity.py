"""A real vLLM serves SmolLM2 with the demo's adapters in every form; the float32 logits of PEFT say what is right."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gora_serve.config import ExportConfig, ServeConfig
from gora_serve.errors import RunError
from gora_serve.integrity.fingerprint import Expected, read_fingerprint
from gora_serve.parity import check_parity
from gora_serve.serving.canary import ASKED, check_canary
from gora_serve.serving.client import ChatRequest, Completion, ask_all, complete, run_all
from gora_serve.serving.engine import Server, free_port, running_server
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.process import session_members
from gora_serve.serving.start import prepare
from gora_serve.serving.status import read_status
from gora_serve.training.export import export

pytestmark = [
    pytest.mark.e2e,
    # torch and its dependents warn about their own deprecated calls while they are imported and while PEFT is at work.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TOLERANCE = 1e-4
STEPS = 2  # the prompt's last position, and one decoding step
PROMPTS = (
    "The capital of France is a city on the river Seine, and the capital of Italy is",
    "Book a table for four people at an Italian restaurant near the station tomorrow evening at",
    "Question: a train leaves at nine and arrives at noon. How many hours does the journey take? Answer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a small village at the foot of a mountain, where every winter",
    "Play some quiet jazz in the living room and turn the volume down to",
    "Water boils at one hundred degrees Celsius, and it freezes at",
    "Dear colleagues, thank you for your patience. The meeting has been moved to",
)
KEY = "a-secret-key-0123456789"


@dataclass(frozen=True)
class Case:
    """One request and its answer."""

    model: str
    prompt: tuple[int, ...]
    answer: Completion


@pytest.fixture(scope="module")
def exports(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One task in unit form, the other in native and in padded form, by the name it is served under."""
    folder = tmp_path_factory.mktemp("exports")
    native = export(demo / "runs" / "requests", folder / "native", ExportConfig("native"))
    padded = export(demo / "runs" / "requests", folder / "padded", ExportConfig("padded"))
    return {"unit": demo / "adapters" / "banking", "native": native.folder, "padded": padded.folder}


@pytest.fixture(scope="module")
def peft_model(smollm2: Path, exports: dict[str, Path]) -> Any:
    """The base in float32 with all adapters, as PEFT loads them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, exports["unit"], adapter_name="unit")
    for name in ("native", "padded"):
        model.load_adapter(exports[name], adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine") / "engine.log"


@pytest.fixture(scope="module")
def plan(smollm2: Path, exports: dict[str, Path]) -> Iterator[ServePlan]:
    config = ServeConfig(port=free_port(), dtype="float32", max_model_len=512, served_name="base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)  # the client's, too
        made, warnings = prepare(str(smollm2), list(exports.items()), config)
        assert not warnings
        yield made


@pytest.fixture(scope="module")
def server(plan: ServePlan, log: Path) -> Iterator[Server]:
    """In the end it is asked to stop while it answers, and answers whole."""
    begun, pool = threading.Event(), ThreadPoolExecutor(1)
    with running_server(plan, log=log) as running:
        yield running
        under_way = pool.submit(streamed, running.url, "unit", 40, begun)
        assert begun.wait(60)
    lines = under_way.result(60)
    pool.shutdown()
    assert lines[-1] == "[DONE]"
    assert sum(len(json.loads(line)["choices"]) for line in lines[:-1]) >= 40
    assert session_members(running.pid) == ()


def streamed(url: str, model: str, tokens: int, begun: threading.Event, **more: Any) -> list[str]:
    """The data lines of a streamed answer of so many tokens; `begun` is set with the first one."""
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True, "stream": True, **more}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    lines = []
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            if line.startswith(b"data: "):
                lines.append(line[6:].strip().decode())
                begun.set()
    return lines


@pytest.fixture(scope="module")
def cases(smollm2: Path, server: Server) -> list[Case]:
    """One concurrent batch of all prompts on the base and all adapters, neighbors on different models."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = [(model, tuple(tokenizer(prompt)["input_ids"])) for prompt in PROMPTS for model in server.models]
    assert len(asked) >= 24
    jobs = [partial(complete, server.url, model, prompt, STEPS, logprobs=5) for model, prompt in asked]
    answers = run_all(jobs, workers=len(jobs))
    return [Case(model, prompt, answer) for (model, prompt), answer in zip(asked, answers, strict=True)]


def peft_logprobs(model: Any, case: Case, name: str) -> Any:
    """PEFT's log probabilities at each generated position, given the served tokens; (STEPS, vocabulary)."""
    import contextlib

    import torch

    served = [next(iter(step)) for step in case.answer.top]
    tokens = torch.tensor([[*case.prompt, *served[:-1]]])  # (1, prompt + STEPS - 1)
    if name != "base":
        model.set_adapter(name)
    context = model.disable_adapter() if name == "base" else contextlib.nullcontext()
    with context, torch.no_grad():
        return model(tokens).logits[0, -STEPS:].log_softmax(-1)


def largest_difference(model: Any, cases: list[Case], *, shift: int = 0) -> dict[str, float]:
    """The largest difference of a top-5 log probability to PEFT's, by model; `shift` compares with another model's."""
    names = ["base", "unit", "native", "padded"]
    worst = dict.fromkeys(names, 0.0)
    for case in cases:
        expected = peft_logprobs(model, case, names[(names.index(case.model) + shift) % len(names)])
        for step, row in zip(case.answer.top, expected, strict=True):
            assert len(step) >= 5
            found = max(abs(value - float(row[token])) for token, value in step.items())
            worst[case.model] = max(worst[case.model], found)
    return worst


def test_served_logprobs_are_those_of_peft(
    peft_model: Any, cases: list[Case], record_property: Callable[[str, object], None]
) -> None:
    worst = largest_difference(peft_model, cases)
    record_property("largest difference", worst)
    assert all(value < TOLERANCE for value in worst.values()), worst


def test_the_comparison_can_fail(peft_model: Any, cases: list[Case]) -> None:
    """Compared with another task's logits, every model is far off: the adapters do differ."""
    worst = largest_difference(peft_model, [case for case in cases if case.model in ("base", "unit")], shift=2)
    assert worst["base"] > 100 * TOLERANCE
    assert worst["unit"] > 100 * TOLERANCE


def test_chat_answers_come_in_order(server: Server) -> None:
    requests = [
        ChatRequest(model, [{"role": "user", "content": "Name a color."}], max_tokens=6)
        for model in (*server.models, *server.models)
    ]
    answers = ask_all(server.url, requests, workers=len(requests))
    assert all(answers)
    assert answers[:4] == answers[4:]
    assert answers[2] == answers[3]  # native and padded are one adapter


@pytest.mark.parametrize("name", ["unknown", "../adapters", "/etc/passwd", "unit/../native"])
def test_names_that_are_no_model_are_404(server: Server, name: str) -> None:
    """Also those that are paths: nothing turns a model's name into a file."""
    with pytest.raises(RunError, match="HTTP 404"):
        complete(server.url, name, [1], 1)


def fingerprint_of(folder: Path) -> tuple[Expected, ...]:
    file = folder / "gora_manifest.json"
    return read_fingerprint(json.loads(file.read_text())["canary"], file)


def test_each_adapter_answers_as_its_fingerprint(server: Server) -> None:
    """What PEFT said in float64 when it was exported, and the engine in float32 now."""
    assert [checked.name for checked in server.checked] == ["unit", "native", "padded"]
    for checked in server.checked:
        assert checked.differs
        assert checked.distance is not None
        assert checked.distance < 1e-3


def test_the_canary_tells_another_adapter_and_none_at_all(server: Server, exports: dict[str, Path]) -> None:
    """Held to the fingerprint of the other task, and to an answer that is the base's own."""

    def ask(model: str, tokens: Sequence[int]) -> Mapping[int, float]:
        return complete(server.url, model, tokens, 1, logprobs=ASKED).top[0]

    with pytest.raises(RunError, match="GS-7351"):
        check_canary("native", "base", fingerprint_of(exports["unit"]), 0.25, ask)
    with pytest.raises(RunError, match="GS-7350"):
        check_canary("base", "base", (), 0.01, ask)


def test_every_model_is_verified_against_peft(plan: ServePlan, server: Server) -> None:
    compared = list(check_parity(plan))
    assert [one.name for one in compared] == list(server.models)
    for one in compared:
        assert one.count >= 150  # log probabilities; an answer that ends early has fewer
        assert one.distance < 1e-3


def test_an_adapter_under_another_name_does_not_pass(plan: ServePlan, server: Server) -> None:
    """PEFT is given the adapter of the other task."""
    unit, native, padded = plan.adapters
    crossed = replace(plan, adapters=(replace(unit, path=native.path), replace(native, path=unit.path), padded))
    found = check_parity(crossed)
    assert next(found).name == "base"
    with pytest.raises(RunError, match="GS-7353"):
        next(found)


def asked(url: str, route: str, method: str, key: str | None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = b"{}" if method in ("POST", "PUT", "PATCH") else None
    request = urllib.request.Request(url + route, body, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as err:
        with err:
            return err.code


def test_no_route_answers_without_the_key(server: Server) -> None:
    """The server's own list of routes, and those that are not in it."""
    request = urllib.request.Request(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        paths = json.loads(response.read())["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert {("POST", "/invocations"), ("POST", "/tokenize"), ("POST", "/v1/chat/completions")} <= routes
    hidden = (
        "/metrics",
        "/metrics/",
        "//metrics",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/adapters",
        "/health",
        "/gora-serve/status",
        "/nowhere",
    )
    routes |= {(method, path) for path in hidden for method in ("GET", "POST", "DELETE", "OPTIONS")}
    assert len(routes) > 40
    for method, path in sorted(routes):
        for key in (None, "another-key-0123456789"):
            assert asked(server.url, path, method, key) == 401, (method, path)
    for path in ("/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert asked(server.url, path, "POST", KEY) == 403
    assert asked(server.url, "/metrics", "GET", KEY) == 200


def scraped(url: str) -> dict[tuple[str, ...], float]:
    """Every sample of ours on vLLM's own /metrics, as the client library of Prometheus reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert any(sample.name.startswith("vllm:") for sample in samples)
    ours = [sample for sample in samples if sample.name.startswith("gora_serve_")]
    return {(one.name[11:], *(one.labels[label] for label in sorted(one.labels))): one.value for one in ours}


def test_requests_and_tokens_are_counted_by_model(server: Server) -> None:
    """Of a stream that tells no usage too: vLLM leaves it for us."""
    before = scraped(server.url)
    told = streamed(server.url, "native", 5, threading.Event(), stream_options={"include_usage": True})
    usage = json.loads(told[-2])["usage"]
    streamed(server.url, "native", 5, threading.Event())
    complete(server.url, "native", [1, 2, 3], 2)
    with pytest.raises(RunError, match="HTTP 404"):
        complete(server.url, "nobody", [1], 1)
    after = scraped(server.url)

    def more(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("requests_total", "native", "200") == 3
    assert more("requests_total", "(unknown)", "404") == 1
    assert more("prompt_tokens_total", "native") == 3 * usage["prompt_tokens"] == 9
    assert more("completion_tokens_total", "native") == 2 * usage["completion_tokens"] + 2 == 12
    assert more("request_seconds_count", "native") == 3
    assert more("first_token_seconds_count", "native") == 2
    assert after.get(("requests_without_usage_total", "native"), 0.0) == 0


def test_where_the_adapters_are_and_how_the_server_stands(plan: ServePlan, server: Server) -> None:
    complete(server.url, "unit", [1, 2, 3], 1)
    found = read_status(server.url, KEY)
    assert found.state == "ready"
    assert [model["name"] for model in found.models] == list(server.models)
    for model, adapter in zip(found.models[1:], plan.adapters, strict=True):
        form = {"padded": "uniform"}.get(adapter.name, adapter.name)  # called after the form that they were exported in
        assert (model["root"], model["form"], model["resident"]) == (adapter.root, form, "slot")
        assert scraped(server.url)["adapter_residency", adapter.name, "slot"] == 1
    unit = found.models[1]
    assert unit["requests"]["200"] >= 1
    assert 0 < unit["p50"] <= unit["p95"]


def test_the_key_is_in_no_argument_and_no_log(server: Server, log: Path) -> None:
    assert KEY not in log.read_text(errors="replace")
    for member in session_members(server.pid):
        assert KEY.encode() not in Path(f"/proc/{member}/cmdline").read_bytes()
