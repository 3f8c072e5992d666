"""Who may reach the server: the address, whether it needs a key, and what the guard inside the engine is told."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

from gora_serve.errors import UsageError
from gora_serve.serving.guard import KEYED, KEYLESS, MODE, OPEN_ROUTES
from gora_serve.serving.keys import KEY_FILE, read_keys

# vLLM puts the last one outermost: requests are counted whatever becomes of them, and the guard lets them through.
MIDDLEWARE = (
    "--middleware", "gora_serve.serving.status_route.StatusRoute", "--middleware", "gora_serve.serving.guard.Guard",
    "--middleware", "gora_serve.serving.meter.Meter",
)  # fmt: skip
# What may be opened to clients without a key: routes that tell of the server, and do no work.
OPENABLE = ("/health", "/ping", "/metrics", "/version", "/load")


def guard_environment(
    host: str, key_file: Path | None, open_routes: Sequence[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """Return what the guard is told. The keys themselves are not in it.

    Raises UsageError: GS-283 for a server that others can reach and that has no key, GS-290 for a route that stays
    shut.
    """
    for route in open_routes:
        if route not in OPENABLE:
            raise UsageError(
                "this route cannot be opened", code="GS-290", expected=", ".join(OPENABLE), actual=route,
                hint="clients of any other route need a key",
            )  # fmt: skip
    keys = read_keys(environ, key_file)
    if not keys and not is_loopback(host):
        hint = "set VLLM_API_KEY in the environment, give --api-key-file, or serve on 127.0.0.1 behind a gateway"
        raise UsageError("a server that others can reach needs an API key", code="GS-283", actual=host, hint=hint)
    told = {MODE: KEYED if keys else KEYLESS, OPEN_ROUTES: ",".join(open_routes)}
    return told | ({KEY_FILE: str(key_file.absolute())} if key_file else {})


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """Return the address that this machine reaches the server at; an unspecified host listens on loopback
    too.
    """
    local = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
