"""The half that lives in the engine's process: who may ask it, what is found under which name, and what is unloaded
when. vLLM's objects are stood in for by as little as it looks at; tests/e2e/test_live.py has the real ones."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gora_serve.serving.guard import Guard
from gora_serve.serving.inside import LONGEST, ROUTE

TOKEN, KEY = "the-parents-token", "a-secret-key-0123456789"
KEYLESS = {"GORA_SERVE_GUARD": "loopback", "GORA_SERVE_TOKEN": TOKEN}
KEYED = {"GORA_SERVE_GUARD": "key", "VLLM_API_KEY": KEY, "GORA_SERVE_TOKEN": TOKEN}
OURS = (b"X-Gora-Serve-Token", TOKEN.encode())


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Engine:
    """What vLLM's engine client is asked for."""

    held: set[int] = field(default_factory=set)
    states: dict[str, Any] = field(default_factory=dict)
    loads: list[LoRARequest] = field(default_factory=list)

    @property
    def output_processor(self) -> Any:
        return SimpleNamespace(request_states=self.states)

    async def add_lora(self, request: LoRARequest) -> bool:
        await asyncio.sleep(0)
        if "bad" in request.lora_path:
            raise ValueError("no such module")
        self.loads.append(request)
        self.held.add(request.lora_int_id)
        return True

    async def remove_lora(self, number: int) -> bool:
        self.held.remove(number)
        return True

    async def list_loras(self) -> set[int]:
        return set(self.held)


class Server:
    """The guard in front of an application that looks a model up, as vLLM's handlers do, and then takes its time."""

    def __init__(self, environ: dict[str, str] = KEYLESS) -> None:
        fixed = LoRARequest("fixed", 1, "/fixed")
        self.engine = Engine({1})
        numbers = itertools.count(2)
        counter = SimpleNamespace(inc=lambda _: next(numbers))
        self.models = SimpleNamespace(
            lora_requests={"fixed": fixed}, lora_id_counter=counter, engine_client=self.engine
        )
        self.app = SimpleNamespace(state=SimpleNamespace(openai_serving_models=self.models))
        self.answered: list[LoRARequest] = []
        self.guard = Guard(self._handler, environ)

    async def _handler(self, scope: Any, receive: Any, send: Any) -> None:
        name, until = scope["model"], scope["until"]
        if name not in self.models.lora_requests:
            return await self._say(send, 404)
        found = await asyncio.create_task(self._look_up(name))  # middlewares of vLLM's start tasks
        await until.wait()
        self.answered.append(found)
        await self._say(send, 200)

    async def _look_up(self, name: str) -> LoRARequest:
        found: LoRARequest = self.models.lora_requests[name]
        return found

    async def _say(self, send: Any, status: int) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def request(self, name: str, until: asyncio.Event) -> int:
        return (await self._ask({"path": "/v1/completions", "model": name, "until": until}, b""))[0]

    async def change(self, do: str, **more: str) -> dict[str, Any]:
        status, body = await self._ask(
            {"path": ROUTE, "headers": [OURS]}, json.dumps({"do": do, "most": "9", **more}).encode()
        )
        return {"status": status, **json.loads(body)}

    async def _ask(self, scope: dict[str, Any], body: bytes, kind: str = "http") -> tuple[int, bytes]:
        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        whole = {"type": kind, "method": "POST", "headers": [], "app": self.app, **scope}
        await self.guard(whole, receive, send)
        return said[0].get("status", said[0].get("code")), said[-1].get("body", b"")


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's class of requests, without ten seconds of imports."""
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.lora.request"].LoRARequest = LoRARequest  # type: ignore[attr-defined]


def running(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run an async test; functools.wraps would show pytest its parameters."""

    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__doc__ = test.__doc__
    return run


@running
async def test_only_the_parent_may_ask() -> None:
    for environ, headers, status in (
        (KEYLESS, [], 403),
        (KEYLESS, [(b"x-gora-serve-token", b"another")], 403),
        ({"GORA_SERVE_GUARD": "loopback"}, [OURS], 403),
        ({"GORA_SERVE_GUARD": "loopback"}, [(b"x-gora-serve-token", b"")], 403),
        (KEYED, [OURS], 401),
        (KEYED, [(b"authorization", f"Bearer {KEY}".encode())], 403),
        (KEYED, [OURS, (b"authorization", f"Bearer {KEY}".encode())], 200),
    ):
        for path in (ROUTE, f"{ROUTE}/", f"/{ROUTE}"):
            server = Server(environ)
            asked = await server._ask({"path": path, "headers": headers}, b'{"do": "unload"}')
            assert asked[0] == status, headers
            assert server.engine.held == {1}
    assert (await Server()._ask({"path": ROUTE, "headers": [OURS]}, b"", "websocket"))[0] == 1008


@running
async def test_an_adapter_on_trial_is_found_by_those_who_know() -> None:
    server = Server()
    told = await server.change("try", name="a", path="/store/1", alias="a.secret")
    assert (told["status"], told["number"], told["resident"]) == (200, 2, [1, 2])
    done = asyncio.Event()
    done.set()
    assert await server.request("a.secret", done) == 200
    assert await server.request("a", done) == 404
    names = server.models.lora_requests
    assert [one.lora_name for one in names.values()] == ["fixed"], "nobody lists it"
    await server.change("publish", name="a", alias="a.secret")
    assert await server.request("a", done) == 200
    assert await server.request("a.secret", done) == 404
    assert [one.lora_name for one in names.values()] == ["fixed", "a"]
    assert server.answered[-1] == LoRARequest("a", 2, "/store/1")


@running
async def test_one_that_does_not_pass_is_unloaded() -> None:
    server = Server()
    await server.change("try", name="a", path="/store/1", alias="x")
    assert server.engine.held == {1, 2}, "it is on trial"
    await server.change("drop", alias="x")
    assert (await server.change("unload"))["resident"] == [1, 2]
    assert (await server.change("unload"))["resident"] == [1]
    assert list(server.models.lora_requests) == ["fixed"]


@running
async def test_a_parent_that_gave_up_leaves_nothing_behind() -> None:
    """Also where it never said that a trial is over: it does one thing at a time."""
    server = Server()
    for alias in ("x", "y"):
        await server.change("try", name="a", path=f"/store/{alias}", alias=alias)
    for _ in range(2):
        await server.change("unload")
    assert server.engine.held == {1}


@running
async def test_requests_end_on_the_version_that_they_began_with() -> None:
    """And that is unloaded after the last of them, not before, while new ones already have the new version."""
    server = Server()
    await server.change("try", name="a", path="/store/1", alias="x")
    await server.change("publish", name="a", alias="x")
    first, second = asyncio.Event(), asyncio.Event()
    old = asyncio.create_task(server.request("a", first))
    other = asyncio.create_task(server.request("fixed", second))
    await asyncio.sleep(0.01)
    told = await server.change("try", name="a", path="/store/2", alias="y")
    assert told["number"] == 3, "another number: nothing of the old one is taken for it"
    await server.change("publish", name="a", alias="y")
    for _ in range(3):
        assert (await server.change("unload"))["resident"] == [1, 2, 3]
    ready = asyncio.Event()
    ready.set()
    assert await server.request("a", ready) == 200
    assert server.answered[-1].lora_path == "/store/2"
    first.set()
    assert await old == 200
    assert server.answered[-1].lora_path == "/store/1"
    for _ in range(2):
        told = await server.change("unload")
    assert told["resident"] == [1, 3], "requests for others do not keep it"
    second.set()
    await other


@running
async def test_a_request_that_breaks_off_keeps_nothing() -> None:
    server = Server()
    await server.change("try", name="a", path="/store/1", alias="x")
    await server.change("publish", name="a", alias="x")
    task = asyncio.create_task(server.request("a", asyncio.Event()))
    await asyncio.sleep(0.01)
    await server.change("withdraw", name="a")
    await server.change("unload")
    assert (await server.change("unload"))["resident"] == [1, 2]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.change("unload")
    assert (await server.change("unload"))["resident"] == [1]


@running
async def test_what_the_engine_still_computes_is_not_unloaded() -> None:
    """Answers in the background have no request of HTTP any more."""
    server = Server()
    await server.change("try", name="a", path="/store/1", alias="x")
    await server.change("publish", name="a", alias="x")
    server.engine.states = {
        "r": SimpleNamespace(lora_request=server.models.lora_requests["a"]),
        "s": SimpleNamespace(lora_request=None),
    }
    await server.change("withdraw", name="a")
    for _ in range(3):
        assert (await server.change("unload"))["resident"] == [1, 2]
    server.engine.states = {}
    await server.change("unload")
    assert (await server.change("unload"))["resident"] == [1]


@running
async def test_what_is_refused_is_told() -> None:
    server = Server()
    told = await server.change("try", name="a", path="/bad", alias="x")
    assert told == {"status": 409, "error": "ValueError: no such module"}
    assert list(server.models.lora_requests.trial) == []
    for body in (
        b"",
        b"[]",
        b'{"do": "serve"}',
        b'{"do": "try"}',
        b"x" * (LONGEST + 1),
        b'{"do": "publish", "alias": 1}',
    ):
        assert (await server._ask({"path": ROUTE, "headers": [OURS]}, body))[0] == 409
    assert (await server.change("withdraw", name="never"))["status"] == 200
    assert server.engine.held == {1}


@running
async def test_no_adapter_is_loaded_that_would_make_another_go() -> None:
    """Whatever the parent believes: the engine itself is asked what it holds."""
    server = Server()
    assert (await server.change("try", name="a", path="/store/1", alias="a.1", most="2"))["status"] == 200
    told = await server.change("try", name="b", path="/store/2", alias="b.1", most="2")
    assert told["status"] == 409
    assert server.engine.held == {1, 2}
    await server.change("unload")  # what was tried is over
    await server.change("unload")
    assert server.engine.held == {1}
