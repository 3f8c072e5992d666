"""Counts every request by the model that it asks for: an ASGI class for `vllm serve --middleware`, around the guard.

Bodies pass through as they come. Of a request only the name of its model is kept, of an answer its last bytes; what
vLLM leaves in the request's own state says how many tokens there were, also of a stream that does not tell. Canaries,
which the server's parent sends, are not counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from gora_serve.serving.asgi import App, Receive, Scope, Send
from gora_serve.serving.guard import (
    INVOCATIONS,
    MODEL_HEADER,
    TOKEN,
    header_in,
    is_parent,
    route_of,
    token_digest,
)
from gora_serve.serving.json_pieces import TopLevelString, UsageTail
from gora_serve.serving.metrics import UNKNOWN, Metrics, shared
from gora_serve.serving.residency import served_names

LOG_REQUESTS, LOG_MARK = "GORA_SERVE_LOG_REQUESTS", "GORA_SERVE_LOG_MARK"
DISCONNECTED, FINISHED = "disconnected", "request finished"
# Answered by POST too, and no work of a model.
UNCOUNTED = frozenset({"/tokenize", "/detokenize", "/gora-serve/status"})


class Meter:
    """Counts requests that are POSTed, whatever becomes of them: refused, failed and given up by the client too."""

    def __init__(self, app: App, environ: Mapping[str, str] | None = None, metrics: Metrics | None = None) -> None:
        told = os.environ if environ is None else environ
        self._app = app
        self._metrics = metrics or shared()
        self._token = token_digest(told.get(TOKEN))
        self._log = told.get(LOG_REQUESTS) == "1"
        self._mark = told.get(LOG_MARK, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, as ASGI has it."""
        counted = scope["type"] == "http" and scope.get("method") == "POST" and route_of(scope) not in UNCOUNTED
        if not counted or is_parent(scope.get("headers", ()), self._token):
            return await self._app(scope, receive, send)
        seen, names = Exchange(receive, send), served_names(scope.get("app"))
        try:
            await self._app(scope, seen.receive, seen.send)
        except BaseException:
            seen.failed = True
            raise
        finally:
            self._count(seen, scope, names)

    def _count(self, seen: Exchange, scope: Scope, names: Collection[str]) -> None:
        """Count an exchange that is over. names: served when it began, for an adapter may be withdrawn meanwhile.

        Nothing here may fail, for the answer's sake.
        """
        took, name, status = time.monotonic() - seen.began, seen.model(), seen.outcome()
        if route_of(scope) == INVOCATIONS:
            name = header_in(scope.get("headers", ()), MODEL_HEADER).decode("latin-1")
        model = name if name is not None and name in {*names, *served_names(scope.get("app"))} else UNKNOWN
        metrics = self._metrics
        metrics.requests.labels(model, status).inc()
        tokens = vllm_usage(scope) or seen.usage.tokens()
        if tokens is not None:
            metrics.prompt_tokens.labels(model).inc(tokens[0])
            metrics.completion_tokens.labels(model).inc(tokens[1])
        elif seen.status is not None and seen.status < 300:
            metrics.without_usage.labels(model).inc()
        if status.startswith("2"):
            metrics.seconds.labels(model).observe(took)
        if status.startswith("5"):
            metrics.last_error.labels(model).set(time.time())
        if seen.first is not None:
            metrics.first.labels(model).observe(seen.first)
        if self._log:
            self._say(model, status, scope, took, tokens, seen.first)

    def _say(
        self, model: str, status: str, scope: Scope, took: float, tokens: tuple[int, int] | None, first: float | None
    ) -> None:
        event = {
            "model": model, "status": status, "seconds": round(took, 4),
            "first_token_seconds": None if first is None else round(first, 4),
            "prompt_tokens": tokens and tokens[0], "completion_tokens": tokens and tokens[1],
        }  # fmt: skip
        if self._mark:
            text = self._mark + json.dumps({"event": FINISHED, **event})
        else:
            text = f"{FINISHED}: " + " ".join(f"{key}={value}" for key, value in event.items())
        with suppress(OSError, ValueError):  # a full disk, or a closed stream
            print(text, file=sys.stderr, flush=True)


class Exchange:
    """One request and its answer as they pass: what is kept of them is bounded."""

    def __init__(self, receive: Receive, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._receive, self._send, self._clock = receive, send, clock
        self.began = clock()
        self.status: int | None = None
        self.first: float | None = None  # seconds to the first bytes of a streamed answer
        self.usage = UsageTail()
        self.failed = self._gone = self._over = self._streams = False
        self._asked, self._answered = TopLevelString("model"), TopLevelString("model")
        self._left = 4096  # bytes of the answer in which it may name its model

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._asked.feed(message.get("body", b""))
        elif message["type"] == "http.disconnect" and not self._over:
            self._gone = True
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self._answer(message.get("body", b""))
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._over = True

    def _answer(self, body: bytes) -> None:
        if body and self._streams and self.first is None:
            self.first = self._clock() - self.began
        if self._left > 0:
            self._answered.feed(body[: self._left])
            self._left -= len(body)
        self.usage.feed(body)

    def model(self) -> str | None:
        """Return the name that was asked for, or else the one that answered."""
        return self._asked.value or self._answered.value

    def outcome(self) -> str:
        """Return the status of the answer, or that its client did not wait for it: vLLM then answers 200 to nobody."""
        if self._gone:
            return DISCONNECTED
        if self._over and self.status is not None:
            return str(self.status)
        return "500" if self.failed or self.status is None else DISCONNECTED


def vllm_usage(scope: Scope) -> tuple[int, int] | None:
    """Return (prompt, completion) tokens as vLLM 0.32 leaves them for middleware (RequestResponseMetadata)."""
    state = scope.get("state")
    told = state.get("request_metadata") if isinstance(state, Mapping) else None
    usage = getattr(told, "final_usage_info", None)
    prompt = getattr(usage, "prompt_tokens", None)
    if not isinstance(prompt, int):
        return None
    return prompt, int(getattr(usage, "completion_tokens", None) or 0)
