"""Counting by model: a real server and real connections, and Prometheus' own parser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gora_serve.errors import InputError
from gora_serve.serving import residency as module
from gora_serve.serving.ledger import Ledger
from gora_serve.serving.meter import Meter
from gora_serve.serving.metrics import UNKNOWN, Metrics, quantile
from gora_serve.serving.residency import residency
from serving.metered import HEADERS, Application, Bench, adapter, bench, eventually, httpx, prometheus_client, reply

__all__ = ["bench"]


def test_requests_and_tokens_by_model_and_status(bench: Bench) -> None:
    for model in ("a", "a", "b", "base"):
        assert bench.ask(model=model).status_code == 200
    bench.ask(model="a", status=400)
    bench.ask(model="nobody", status=404)
    bench.ask(status=200)  # no name: the base answers, and says so
    found = bench.scrape()
    assert found["requests_total", "a", "200"] == 2
    assert found["requests_total", "a", "400"] == 1
    assert found["requests_total", "b", "200"] == 1
    assert found["requests_total", "base", "200"] == 2
    assert found["requests_total", UNKNOWN, "404"] == 1
    assert found["prompt_tokens_total", "a"] == 15  # the one of 400 told its usage, too
    assert found["completion_tokens_total", "b"] == 3
    assert found["request_seconds_count", "a"] == 2, "errors are quick, and would hide how slow answers are"
    assert found["request_seconds_bucket", "300.0", "a"] == 2
    assert not any(key[0].startswith("first_token") for key in found), "nothing was streamed"


def test_labels_are_bounded(bench: Bench) -> None:
    bench.ask(model="a")
    before = len(bench.scrape())
    for number in range(50):
        bench.ask(model=f"name-{number}", status=404)
        bench.ask(model=f'"}}\n{number}' * 100, status=404)
    found = bench.scrape()
    assert found["requests_total", UNKNOWN, "404"] == 100
    assert len(found) <= before + 3


@pytest.mark.parametrize(("state", "include"), [(True, False), (False, True), (True, True)])
def test_a_stream_arrives_as_it_is_sent_and_is_counted(bench: Bench, state: bool, include: bool) -> None:
    arrivals, text = [], b""
    asked = {"model": "a", "stream": 8, "state": state, "include_usage": include}
    with bench.client.stream("POST", "/v1/completions", json=asked) as answer:
        for piece in answer.iter_raw():
            arrivals.append(time.monotonic())
            text += piece
    assert text.count(b"data: ") == 9 + include
    assert len(arrivals) > 4, "it was held back"
    found = bench.scrape()
    assert found["completion_tokens_total", "a"] == 3
    assert found["first_token_seconds_count", "a"] == 1
    assert found["first_token_seconds_sum", "a"] < found["request_seconds_sum", "a"]
    assert ("requests_without_usage_total", "a") not in found


def test_a_stream_that_tells_no_usage_is_not_guessed(bench: Bench) -> None:
    bench.ask(model="a", stream=3, state=False)
    found = bench.scrape()
    assert found["requests_total", "a", "200"] == 1
    assert found["requests_without_usage_total", "a"] == 1
    assert ("completion_tokens_total", "a") not in found


def test_a_client_that_goes_away(bench: Bench) -> None:
    with bench.client.stream("POST", "/v1/completions", json={"model": "a", "stream": 1000}) as answer:
        next(answer.iter_raw())
    assert eventually(lambda: bench.requests().get(("a", "disconnected")) == 1)
    found = bench.scrape()
    assert found["requests_without_usage_total", "a"] == 1
    assert ("request_seconds_count", "a") not in found


def test_an_adapter_that_is_withdrawn_while_it_answers(bench: Bench) -> None:
    with bench.client.stream("POST", "/v1/completions", json={"model": "c", "stream": 20}) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        del bench.app.state.openai_serving_models.lora_requests["c"]
        list(pieces)
    assert bench.requests() == {("c", "200"): 1}


def test_the_route_whose_model_is_in_a_header(bench: Bench) -> None:
    named = {"X-Amzn-SageMaker-Adapter-Identifier": "b"}
    assert bench.client.post("/invocations", json={"model": "a"}, headers=named).status_code == 200
    assert bench.client.post("/invocations", json={"model": "a"}).status_code == 400
    assert bench.requests() == {("b", "200"): 1, (UNKNOWN, "400"): 1}


def test_errors_of_the_application_and_of_clients(bench: Bench) -> None:
    assert bench.ask(model="a", **{"raise": True}).status_code == 500
    assert bench.ask(model="a", status=503).status_code == 503
    assert bench.client.post("/v1/completions", content=b"{", headers=HEADERS).status_code == 500
    assert bench.ask({"Authorization": "Bearer wrong-key-0123456789"}, model="a").status_code == 401
    assert bench.client.post("/v1/load_lora_adapter", json={"model": "a"}).status_code == 403
    assert bench.requests() == {
        ("a", "500"): 1, ("a", "503"): 1, (UNKNOWN, "500"): 1, (UNKNOWN, "401"): 1, (UNKNOWN, "403"): 1,
    }  # fmt: skip
    assert abs(bench.scrape()["last_server_error_time_seconds", "a"] - time.time()) < 60


def test_what_is_no_request_to_a_model_is_not_counted(bench: Bench) -> None:
    bench.client.get("/v1/models")
    bench.client.post("/tokenize", json={"model": "a"})
    bench.ask({**HEADERS, "X-Gora-Serve-Token": bench.watch.token}, model="a")
    assert bench.requests() == {}
    bench.ask({**HEADERS, "X-Gora-Serve-Token": "forged"}, model="a")
    assert bench.requests() == {("a", "200"): 1}


def test_a_long_request_passes_in_pieces(bench: Bench) -> None:
    assert bench.ask(prompt="x\n" * 500_000, model="b").status_code == 200
    assert max(bench.app.pieces) < 500_000, "it was held until it was whole"
    assert bench.requests() == {("b", "200"): 1}


def test_many_at_once(bench: Bench) -> None:
    def work(number: int) -> None:
        with httpx.Client(base_url=bench.url, headers=HEADERS, timeout=30, trust_env=False) as client:
            for step in range(10):
                client.post("/v1/completions", json={"model": "abc"[number % 3], "stream": step % 2 and 2})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.requests() == {(name, "200"): 20 for name in "abc"}


def test_what_is_looked_up(bench: Bench) -> None:
    found = bench.scrape()
    assert found["adapter_residency", "a", "slot"] == found["adapter_residency", "c", "listed"] == 1
    assert found["adapter_residency", "a", "listed"] == found["adapter_residency", "c", "slot"] == 0
    assert found["adapter_verify_seconds", "a"] == 0.25
    assert found["degraded",] == 0
    bench.watch.ledger.added(adapter("b"), 1.5)
    bench.watch.ledger.refused("b", InputError("values", code="GS-339"), older=True)
    bench.watch.ledger.refused("new-one", InputError("values", code="GS-339"), older=False)
    bench.watch.ledger.refused("another", InputError("values", code="GS-339"), older=False)
    bench.app.loaded = {1, 2, 3}
    found = bench.scrape()
    assert found["adapter_load_seconds", "b"] == 1.5
    assert found["verification_failures", "b"] == 1
    assert found["verification_failures", UNKNOWN] == 2
    assert found["adapter_residency", "a", "memory"] == 1, "three are loaded, and there are two slots"
    del bench.app.state.openai_serving_models.lora_requests["c"]
    bench.watch.ledger.removed("c")
    found = bench.scrape()
    assert all(found["adapter_residency", "c", where] == 0 for where in ("slot", "memory", "listed"))


def test_the_status_route(bench: Bench) -> None:
    for _ in range(3):
        bench.ask(model="a", stream=2)
    bench.ask(model="nobody", status=404)
    bench.watch.ledger.refused("b", InputError("bad values\n", code="GS-339"), older=True)
    said = bench.client.get("/gora-serve/status").raise_for_status().json()
    assert (said["schema"], said["state"], said["degraded"]) == ("gora-serve/status/1", "ready", None)
    models = {model["name"]: model for model in said["models"]}
    assert list(models) == ["base", "a", "b", "c"]
    a = models["a"]
    assert (a["root"], a["form"], a["rank"], a["resident"]) == (f"sha256:{'a' * 64}", "unit", 8, "slot")
    assert a["requests"] == {"200": 3}
    assert (a["prompt_tokens"], a["completion_tokens"]) == (15, 9)
    assert 0 < a["p50"] <= a["p95"] <= 0.25
    assert 0 < a["first_p50"] <= a["first_p95"]
    assert models["b"]["error"].startswith("[GS-339] bad values\\n")
    assert models["b"]["requests"] == {}
    assert models["base"]["resident"] is None
    assert said["failures"] == {"b": 1}
    assert said["others"][UNKNOWN]["requests"] == {"404": 1}
    assert abs(a["since"] - time.time()) < 60


def test_the_status_route_is_guarded(bench: Bench) -> None:
    for method in ("GET", "POST"):
        assert bench.client.request(method, "/gora-serve/status", headers={"Authorization": "x"}).status_code == 401
    assert httpx.get(f"{bench.url}/metrics", trust_env=False).status_code == 401


def test_requests_are_logged_where_it_is_asked_for(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.ask(model="a", prompt="a secret prompt")
    bench.ask(model="evil\nevent=stop", status=404)
    assert eventually(lambda: len(bench.requests()) == 2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "request finished" in line]
    assert len(lines) == 2
    assert lines[0].startswith("request finished: model=a status=200 seconds=0.")
    assert f"model={UNKNOWN} status=404" in lines[1]
    assert not any("secret" in line or "evil" in line for line in lines)


def test_a_full_disk_under_the_log_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, 200, {})

    async def send(message: Any) -> None:
        said.append(message)

    said: list[Any] = []
    metrics = Metrics(prometheus_client.CollectorRegistry())
    monkeypatch.setattr(sys, "stderr", Full())
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(Meter(inner, {"GORA_SERVE_LOG_REQUESTS": "1"}, metrics)(scope, None, send))  # type: ignore[arg-type]
    assert len(said) == 2


def test_many_scrapes_do_not_keep_the_engine_busy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH", 60.0)
    threads = [threading.Thread(target=bench.scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.app.lookups == 1


def test_where_nothing_of_vllm_is_known() -> None:
    """Another version: names are unknown, and nothing breaks."""
    assert asyncio.run(residency(None)) == {}
    app = Application(prometheus_client.CollectorRegistry())
    app.state.engine_client = SimpleNamespace()
    assert set(asyncio.run(residency(app)).values()) == {"unknown"}


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({0.1: 0, 1.0: 10, float("inf"): 10}, 0.5, 0.55), ({0.1: 10, 1.0: 10, float("inf"): 10}, 0.5, 0.05),
        ({0.1: 0, 1.0: 0, float("inf"): 5}, 0.5, 1.0), ({0.1: 0, float("inf"): 0}, 0.5, None), ({}, 0.5, None),
        ({0.1: 5, 1.0: 10, float("inf"): 10}, 0.95, 0.91),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_prometheus(buckets: dict[float, float], share: float, expected: float | None) -> None:
    """histogram_quantile of Prometheus interpolates within the bucket; checked by hand."""
    assert quantile(buckets, share) == (None if expected is None else pytest.approx(expected))


def test_the_ledger_is_always_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.serves("base", [adapter("a")])
    reading = threading.Event()
    faults: list[Exception] = []

    def read() -> None:
        while not reading.is_set():
            try:
                json.loads(ledger.file.read_bytes())
            except (OSError, ValueError) as err:
                faults.append(err)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(200):
        ledger.refused("a", InputError("x" * 1000, code="GS-339"), older=True)
    reading.set()
    thread.join()
    assert not faults
    told = json.loads(ledger.file.read_bytes())
    assert told["failures"] == {"a": 200}
    assert len(told["models"]["a"]["error"]) == 500


PROCESS = """
import sys
from gora_serve.serving.metrics import UNKNOWN, Metrics
metrics = Metrics()
if sys.argv[1] == "count":
    for _ in range(3):
        metrics.requests.labels("a", "200").inc()
        metrics.seconds.labels("a").observe(0.2)
    metrics.failures.labels("a").set(7)
else:
    from gora_serve.serving.status_route import counted
    print(counted(metrics)["a"]["requests"], counted(metrics)["a"]["p50"])
    print([s.value for f in metrics.families() if f.name.endswith("verification_failures") for s in f.samples])
"""


def test_several_api_servers_count_together(tmp_path: Path) -> None:
    """As vLLM sets it up with --api-server-count: processes of their own, and one folder."""
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def process(word: str) -> str:
        command = [sys.executable, "-c", PROCESS, word]
        return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout

    process("count")
    process("count")
    assert process("read").splitlines() == ["{'200': 6} 0.175", "[7.0]"]
