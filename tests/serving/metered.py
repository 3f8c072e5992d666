"""A real server, whose application behind the guard answers as vLLM does, with the parent's side of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gora_serve.serving import residency
from gora_serve.serving.guard import Guard
from gora_serve.serving.meter import Meter
from gora_serve.serving.metrics import Metrics
from gora_serve.serving.served import ServedAdapter
from gora_serve.serving.status_route import StatusRoute
from gora_serve.serving.watch import FileWatch

uvicorn = pytest.importorskip("uvicorn", reason="vLLM's server (the extra `serve`)")
httpx = pytest.importorskip("httpx", reason="comes with vLLM")
prometheus_client = pytest.importorskip("prometheus_client", reason="comes with vLLM")

KEY = "a-secret-key-0123456789"
HEADERS = {"Authorization": f"Bearer {KEY}"}
USAGE = {"prompt_tokens": 5, "total_tokens": 8, "completion_tokens": 3}


class Application:
    """As vLLM 0.32 from outside: JSON or a stream, errors, and the usage in the request's own state."""

    def __init__(self, registry: Any) -> None:
        adapters = {name: SimpleNamespace(lora_int_id=number) for number, name in enumerate("abc", start=1)}
        models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="base")], lora_requests=adapters)
        config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=2))
        self.loaded = {1, 2}
        self.state = SimpleNamespace(
            openai_serving_models=models, engine_client=SimpleNamespace(list_loras=self.list_loras, vllm_config=config)
        )
        self.metrics = prometheus_client.make_asgi_app(registry=registry)
        self.pieces: list[int] = []
        self.healthy = True
        self.lookups = 0

    async def list_loras(self) -> set[int]:
        self.lookups += 1
        await asyncio.sleep(0.01)
        return self.loaded

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/metrics":
            return await self.metrics(scope, receive, send)
        if scope["path"] == "/health":
            return await reply(send, 200 if self.healthy else 503, {})
        body, more = b"", True
        while more:
            message = await receive()
            self.pieces.append(len(message.get("body", b"")))
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await self.answer(scope, json.loads(body), receive, send)

    async def answer(self, scope: Any, asked: Any, receive: Any, send: Any) -> None:
        if asked.get("state", True):
            usage = SimpleNamespace(prompt_tokens=5, completion_tokens=3)
            scope.setdefault("state", {})["request_metadata"] = SimpleNamespace(final_usage_info=usage)
        if asked.get("raise"):
            raise RuntimeError("an error of the application")
        status = asked.get("status", 200)
        if status != 200:
            return await reply(send, status, {"error": {"message": "no"}})
        if not asked.get("stream"):
            named = {"model": asked.get("model") or "base"}
            return await reply(send, 200, {**named, "choices": [{"text": "x"}], "usage": USAGE})
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.create_task(self.until_gone(receive))
        for number in range(asked["stream"]):
            if gone.done():
                scope["state"].pop("request_metadata", None)
                return
            data = {"model": asked.get("model"), "choices": [{"text": str(number)}], "usage": None}
            await send({"type": "http.response.body", "body": sse(data), "more_body": True})
            await asyncio.sleep(0.01)
        last = sse({"choices": [], "usage": USAGE}) if asked.get("include_usage") else b""
        await send({"type": "http.response.body", "body": last + b"data: [DONE]\n\n", "more_body": False})
        gone.cancel()

    async def until_gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def sse(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def reply(send: Any, status: int, value: Any) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


class Bench:
    """A server that runs, its metrics as they are scraped, and the parent's side of it."""

    def __init__(self, url: str, registry: Any, app: Application, watch: FileWatch) -> None:
        self.url, self.registry, self.app, self.watch = url, registry, app, watch
        self.client = httpx.Client(base_url=url, headers=HEADERS, timeout=30, trust_env=False)

    def ask(self, headers: Any = None, **body: Any) -> Any:
        return self.client.post("/v1/completions", json=body, headers=headers)

    def scrape(self) -> dict[tuple[str, ...], float]:
        """Every sample of ours: (name, label values ...) -> value, as the client library of Prometheus reads it."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.client.get("/metrics").raise_for_status().text
        return {
            (
                sample.name.removeprefix("gora_serve_"),
                *(sample.labels[name] for name in sorted(sample.labels)),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("gora_serve_") and not sample.name.endswith("_created")
        }

    def requests(self) -> dict[tuple[str, ...], float]:
        return {key[1:]: value for key, value in self.scrape().items() if key[0] == "requests_total"}


def adapter(name: str) -> ServedAdapter:
    return ServedAdapter(name, Path(name), 8, ("q",), root=f"sha256:{name * 64}", form="unit", verify_seconds=0.25)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A server that is ready."""
    monkeypatch.setattr(residency, "FRESH", 0.0)
    with make_bench() as made:
        made.watch.started()
        yield made


@contextlib.contextmanager
def make_bench() -> Iterator[Bench]:
    """A server whose parent has not yet said that it is ready."""
    registry = prometheus_client.CollectorRegistry()
    metrics, app = Metrics(registry), Application(registry)

    async def entry(scope: Any, receive: Any, send: Any) -> None:  # as Starlette's application does
        if scope["type"] == "http":
            scope["app"] = app
        await stack(scope, receive, send)

    with FileWatch({}) as watch:
        environ = {"GORA_SERVE_GUARD": "key", "VLLM_API_KEY": KEY, "GORA_SERVE_LOG_REQUESTS": "1"} | watch.environment
        stack = Meter(Guard(StatusRoute(app, environ, metrics), environ), environ, metrics)
        watch.ledger.serves("base", [adapter(name) for name in "abc"])
        with serving(entry) as url:
            made = Bench(url, registry, app, watch)
            with made.client:
                yield made


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert eventually(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
