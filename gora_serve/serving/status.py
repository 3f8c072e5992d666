"""How a server stands, asked over HTTP: what `gora-serve status` shows. Standard library only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gora_serve.errors import MachineError, RunError, UsageError
from gora_serve.serving.client import opener
from gora_serve.serving.status_route import ROUTE, SCHEMA

State = Literal["ready", "degraded", "stopping", "not ready"]
TIMEOUT = 10.0  # seconds
_LIMIT = 16 << 20  # bytes of an answer


@dataclass(frozen=True)
class ServerStatus:
    """A server that answers. reason: why it is not ready, or what else it says of its state. told: what its status
    route says.
    """

    url: str
    state: State
    reason: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[Mapping[str, Any]]:
        found = self.told.get("models")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    def to_json(self) -> dict[str, Any]:
        """Return what `status --json` prints."""
        kept = {key: self.told.get(key) for key in ("models", "others", "failures", "refused", "start_seconds")}
        return {"url": self.url, "state": self.state, "reason": self.reason, **kept}


def server_address(text: str) -> str:
    """Return a server's address as http(s)://host:port. Raises UsageError (GS-2471)."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or any(not character.isprintable() or character == " " for character in url):
        raise UsageError(
            "not the address of a server", code="GS-2471", expected="http://HOST:PORT", actual=text[:200],
            hint="gora-serve status http://127.0.0.1:8000",
        )  # fmt: skip
    if parts.username or parts.password:
        what = "a key does not belong into an address"
        raise UsageError(what, code="GS-2471", hint="--api-key-file, or VLLM_API_KEY in the environment")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def read_status(url: str, key: str | None = None) -> ServerStatus:
    """Ask a server how it stands.

    Raises MachineError (GS-5470) where nobody answers, UsageError (GS-2470) where it wants another key, and RunError
    (GS-7470) where it is no server of gora-serve's.
    """
    code, body = _get(url, ROUTE, key)
    if code == 401:
        raise UsageError(
            "the server wants a key" if key is None else "the server does not know this key", code="GS-2470",
            hint="--api-key-file FILE, or VLLM_API_KEY in the environment",
        )  # fmt: skip
    if code == 503:
        return ServerStatus(url, "not ready", _reason(body))
    told = _json(body)
    if code != 200 or told.get("schema") != SCHEMA:
        raise RunError(
            "what answers there is no server of gora-serve, or one of another version", code="GS-7470", file=url,
            expected=SCHEMA, actual=f"HTTP {code}", hint="check the address",
        )  # fmt: skip
    healthy, body = _get(url, "/health", key)
    if healthy != 200:
        reason = _reason(body) or "the engine is not healthy"
        stopping = reason.removeprefix("stopping: ")
        return ServerStatus(url, "degraded" if stopping == reason else "stopping", stopping, told)
    return ServerStatus(url, "degraded" if told.get("state") != "ready" else "ready", told.get("degraded"), told)


def _get(url: str, route: str, key: str | None) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with opener.open(urllib.request.Request(url + route, headers=headers), timeout=TIMEOUT) as response:
            return int(response.status), response.read(_LIMIT)
    except urllib.error.HTTPError as err:
        with err:
            return err.code, err.read(_LIMIT)
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise MachineError(
            f"nobody answers: {getattr(err, 'reason', None) or err}", code="GS-5470", file=url,
            hint="check that the server runs, and its address; it answers once the model is loaded",
        ) from err  # fmt: skip


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        told = json.loads(body)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _reason(body: bytes) -> str | None:
    error = _json(body).get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return str(message)[:500].removeprefix("degraded: ").removeprefix("not ready: ") if message else None
