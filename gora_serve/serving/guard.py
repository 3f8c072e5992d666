"""What stands in front of vLLM's own routes, inside its process: an ASGI class for `vllm serve --middleware`.

vLLM's key guards /v1 and three other prefixes; here every route wants it, /metrics, /invocations, /tokenize and the
documentation too, but for those that are opened by name. Routes that load or unload are closed to everybody. Until the
parent says that every adapter passed its canary nobody else is served. It is told what to do by environment variables
that `exposure` and `watch` set; without them nothing is let through. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gora_serve.serving import inside
from gora_serve.serving.asgi import App, Receive, Scope, Send, answer_json
from gora_serve.serving.keys import INNER_KEY, KEY_FILE, KEY_VARIABLE, read_keys

MODE, OPEN_ROUTES, STATE_FILE = "GORA_SERVE_GUARD", "GORA_SERVE_OPEN_ROUTES", "GORA_SERVE_STATE"
TOKEN, TOKEN_HEADER = "GORA_SERVE_TOKEN", "x-gora-serve-token"  # of our parent, which asks before others may
KEYED, KEYLESS = "key", "loopback"
# Of SageMaker's route: vLLM puts the header in the place of the body's model, also where there is none, and then the
# base answers whatever the body asks for.
INVOCATIONS, MODEL_HEADER = "/invocations", "x-amzn-sagemaker-adapter-identifier"
WHILE_STOPPING = ("/metrics", "/gora-serve/status")  # what may still be asked
# Of vLLM 0.32, also under SageMaker's names: they load and unload adapters, scale, pause or reset the engine.
CLOSED = (
    "/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep", "/is_scaling_elastic_ep",
    "/collective_rpc", "/sleep", "/wake_up", "/release_kv_cache_memory", "/pause", "/resume", "/abort_requests",
    "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/start_profile", "/stop_profile", "/server_info",
    "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/start_draft_weight_update", "/finish_weight_update", "/update_weight_version", "/weight_checker",
    "/fault_tolerance", "/inference/v1/abort_requests",
)  # fmt: skip


class Guard:
    """Lets a request through, or answers it: 401 without a key, 403 for closed routes, 503 before it is ready, and 400
    where the base would answer in the place of an adapter.

    /health and /ping are answered by 503 while degraded, too, and all that begins while the server stops.
    """

    def __init__(self, app: App, environ: Mapping[str, str] | None = None) -> None:
        told = os.environ if environ is None else environ
        self._app = app
        self._mode = told.get(MODE, KEYED)
        self._open = frozenset(filter(None, told.get(OPEN_ROUTES, "").split(",")))
        self._state = Path(told[STATE_FILE]) if told.get(STATE_FILE) else None
        self._token = token_digest(told.get(TOKEN))
        self._ready = self._state is None
        self._residents = inside.Residents()
        own = {KEY_VARIABLE: told.get(KEY_VARIABLE) or told.get(INNER_KEY, "")}
        keys = read_keys(own, Path(told[KEY_FILE]) if told.get(KEY_FILE) else None)
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        if self._mode != KEYLESS and not self._keys:
            raise RuntimeError(f"the guard needs a key: set {KEY_VARIABLE} or {KEY_FILE}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, as ASGI has it."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        path = route_of(scope)
        if self._mode != KEYLESS and path not in self._open and not self._knows(scope.get("headers", ())):
            return await _refuse(scope, send, 401, "a key is needed: Authorization: Bearer KEY")
        if any(path == closed or path.startswith(f"{closed}/") for closed in CLOSED):
            return await _refuse(scope, send, 403, "this route is closed")
        if path == INVOCATIONS and not header_in(scope.get("headers", ()), MODEL_HEADER):
            return await _refuse(scope, send, 400, f"this route takes the model from the header {MODEL_HEADER} alone")
        if path == inside.ROUTE:
            if scope["type"] != "http" or not is_parent(scope.get("headers", ()), self._token):
                return await _refuse(scope, send, 403, "this route is closed")
            return await self._residents.answer(scope, receive, send)
        if not self._ready and not self._is_ready() and not is_parent(scope.get("headers", ()), self._token):
            return await _refuse(scope, send, 503, "not ready: the adapters are being checked")
        told = read_state(self._state) if self._state is not None else {}
        if told.get("stopping") and path not in WHILE_STOPPING and not is_parent(scope.get("headers", ()), self._token):
            return await _refuse(scope, send, 503, "stopping: what had begun is still answered")
        if path in ("/health", "/ping") and (reason := told.get("degraded")):
            return await _refuse(scope, send, 503, f"degraded: {reason}")
        return await self._residents.through(self._app, scope, receive, send)

    def _is_ready(self) -> bool:
        self._ready = self._state is not None and read_state(self._state).get("ready") is True
        return self._ready

    def _knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Compare with every key, in a time that does not depend on where they differ."""
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = False
        for ours in self._keys:
            known |= hmac.compare_digest(digest, ours)
        return known and scheme.lower() == b"bearer"


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the path as the routes see it: without the root path, doubled slashes and one at the end.

    A line end (%0A) goes too: Starlette's expressions end in "$", which matches before one.
    """
    root = str(scope.get("root_path", ""))
    path = str(scope["path"]).removesuffix("\n")
    path = path.removeprefix(root) if root and f"{path}/".startswith(f"{root.rstrip('/')}/") else path
    return "/" + "/".join(part for part in path.split("/") if part)


def header_in(headers: Sequence[tuple[bytes, bytes]], name: str) -> bytes:
    """Return the first value of a header, empty where there is none."""
    return next((value for given, value in headers if given.lower() == name.encode()), b"")


def token_digest(token: str | None) -> bytes | None:
    """Return what the parent's token is compared by."""
    return hashlib.sha256(token.encode()).digest() if token else None


def is_parent(headers: Sequence[tuple[bytes, bytes]], digest: bytes | None) -> bool:
    """Return whether a request comes from the server's parent."""
    given = header_in(headers, TOKEN_HEADER)
    return digest is not None and hmac.compare_digest(hashlib.sha256(given).digest(), digest)


def read_state(state: Path) -> Mapping[str, Any]:
    """Return what the parent last said: whether the server is ready, and why it is degraded, if it is."""
    try:
        told = json.loads(state.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": reason})
    more = [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await answer_json(send, status, {"error": {"message": reason, "code": status}}, more)
