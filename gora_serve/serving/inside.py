"""Adapters that come and go while the engine runs: the half that lives inside vLLM's API server, behind the guard.

One route, for the server's own parent alone, does what the parent asks for: try an adapter under a name that nobody can
guess, publish it, withdraw a name, unload what nobody uses. vLLM's own routes for that stay closed: they take any path,
reuse the number of the old version, and unload nothing. Standard library only, but for vLLM's class of requests.

Known of vLLM 0.32, and relied on: `app.state.openai_serving_models` has `lora_requests`, a mapping of names that every
handler looks models up in; `lora_id_counter`; and `engine_client` with add_lora, remove_lora and list_loras.
"""

from __future__ import annotations

import asyncio
import json
from contextvars import ContextVar
from typing import Any

from gora_serve.serving.asgi import App, Receive, Scope, Send, answer_json

ROUTE = "/gora-serve/adapters"
LONGEST = 64 << 10  # bytes of what is asked

# The numbers of the adapters that the request at hand has looked up. Tasks that it starts share the set.
_uses: ContextVar[set[int] | None] = ContextVar("gora_serve_uses", default=None)


class Names(dict[str, Any]):
    """vLLM's mapping of names to adapters, which notes who looks one up and finds those that are on trial.

    Adapters on trial are in no listing: `values` does not have them.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(names)
        self.trial: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.trial

    def __getitem__(self, name: str) -> Any:
        found = self.trial[name] if name in self.trial else super().__getitem__(name)
        uses = _uses.get()
        if uses is not None:
            uses.add(found.lora_int_id)
        return found

    def numbers(self) -> set[int]:
        """Return the number of each adapter that has a name."""
        return {one.lora_int_id for one in (*self.values(), *self.trial.values())}


class Residents:
    """What the engine holds, and which requests use it."""

    def __init__(self) -> None:
        self._at_work: list[set[int]] = []
        self._idle: set[int] = set()
        self._one_at_a_time = asyncio.Lock()

    async def through(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and know which adapters it uses until it is answered."""
        uses: set[int] = set()
        self._at_work.append(uses)
        token = _uses.set(uses)
        try:
            await app(scope, receive, send)
        finally:
            _uses.reset(token)
            self._at_work = [one for one in self._at_work if one is not uses]

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do what the parent asks for: 200 with what the engine holds then, or 409 with why not."""
        try:
            async with self._one_at_a_time:
                status, told = 200, await self._do(scope["app"].state.openai_serving_models, await _asked(receive))
        except Exception as err:  # whatever vLLM raises: the parent tells it, and goes on
            status, told = 409, {"error": f"{type(err).__name__}: {err}"}
        await answer_json(send, status, told)

    async def _do(self, models: Any, asked: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(models.lora_requests, Names):
            models.lora_requests = Names(models.lora_requests)
        names: Names = models.lora_requests
        told: dict[str, Any] = {}
        if asked["do"] == "try":
            told["number"] = await _load(models, names, asked)
        elif asked["do"] == "unload":
            names.trial.clear()  # the parent does one thing at a time: what it tried is over
            await self._unload(models.engine_client, names)
        told["resident"] = sorted(await models.engine_client.list_loras())
        _rename(names, asked)  # last: from here on nothing fails
        return told

    async def _unload(self, engine: Any, names: Names) -> None:
        """Unload what has no name and no request, if that was so the last time too.

        A request that ends is taken out of the frontend before the engine hears of it, so once is not enough: an engine
        that is asked to compute with an adapter that it does not hold ends.
        """
        used = set().union(*self._at_work) | _in_engine(engine)
        idle = set(await engine.list_loras()) - names.numbers() - used
        for number in sorted(idle & self._idle):
            await engine.remove_lora(number)
        self._idle = idle


def _rename(names: Names, asked: dict[str, Any]) -> None:
    match asked["do"]:
        case "drop":
            names.trial.pop(asked["alias"], None)
        case "publish":
            names[asked["name"]] = names.trial.pop(asked["alias"])
        case "withdraw":
            names.pop(asked["name"], None)
        case "try" | "unload":
            pass
        case other:
            raise ValueError(f"not known: {other}")


async def _load(models: Any, names: Names, asked: dict[str, Any]) -> int:
    """Load an adapter under a new number, findable by its alias alone; never so many that another would make room."""
    from vllm.lora.request import LoRARequest

    if len(held := await models.engine_client.list_loras()) >= int(asked["most"]):
        raise RuntimeError(f"{len(held)} adapters are loaded, and older versions are still at work")
    number = int(models.lora_id_counter.inc(1))
    request = LoRARequest(lora_name=asked["name"], lora_int_id=number, lora_path=asked["path"])
    names.trial.clear()  # of a parent that stopped waiting
    await models.engine_client.add_lora(request)
    names.trial[asked["alias"]] = request
    return number


def _in_engine(engine: Any) -> set[int]:
    """Return the adapters of requests that the engine still has, also those that nobody waits for (background)."""
    states = engine.output_processor.request_states.values()
    return {one.lora_request.lora_int_id for one in states if one.lora_request is not None}


async def _asked(receive: Receive) -> dict[str, Any]:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError("the request broke off")
        body += message.get("body", b"")
        if len(body) > LONGEST:
            raise ValueError("too long")
        if not message.get("more_body"):
            break
    asked = json.loads(body)
    if not isinstance(asked, dict):
        raise ValueError("not an object")
    return asked
