"""The guard in front of the engine's routes: an ASGI application of its own stands in for vLLM's."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gora_serve.errors import GoraError, MachineError, UsageError
from gora_serve.serving.exposure import guard_environment
from gora_serve.serving.guard import CLOSED, Guard, route_of
from gora_serve.serving.keys import inner as inner_environment
from gora_serve.serving.keys import read_keys
from gora_serve.serving.ledger import read_ledger
from gora_serve.serving.watch import FileWatch

KEY, OTHER = "a-secret-key-0123456789", "another-key-0123456789"
# Routes of vLLM 0.32's own list, with what it leaves open beside a key of its own.
ROUTES = (
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/invocations", "/tokenize",
    "/detokenize", "/tokenizer_info", "/metrics", "/health", "/ping", "/version", "/load", "/docs", "/openapi.json",
    "/redoc", "/score", "/rerank", "/pooling", "/classify", "/inference/v1/generate", "/", "/no/such/route",
)  # fmt: skip


async def inner(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inner"})


def ask(
    environ: Mapping[str, str], path: str, *keys: str, kind: str = "http", root: str = "", method: str = "POST"
) -> Any:
    """Send one request through the guard; the status, or what it said to a websocket. keys: header values."""
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"Authorization", value.encode("latin-1")) for value in keys]
    scope = {"type": kind, "path": path, "root_path": root, "headers": headers, "method": method}
    asyncio.run(Guard(inner, environ)(scope, receive, send))
    return said[0].get("status", said[0].get("code"))


KEYED = {"GORA_SERVE_GUARD": "key", "VLLM_API_KEY": KEY}
LOOPBACK = {"GORA_SERVE_GUARD": "loopback"}


@pytest.mark.parametrize("route", [*ROUTES, *CLOSED])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_every_route_wants_the_key(route: str, method: str) -> None:
    for given in ((), ("Bearer x",), (KEY,), (f"Basic {KEY}",), ("Bearer ",), (f"Bearer {KEY}", f"Bearer {KEY}")):
        assert ask(KEYED, route, *given, method=method) == 401, given


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "/invocations"])
def test_with_the_key_all_but_closed_routes_answer(route: str) -> None:
    assert ask(KEYED, route, f"Bearer {KEY}") == 200
    assert ask(KEYED, route, f"bearer {KEY}") == 200
    assert ask(LOOPBACK, route) == 200


@pytest.mark.parametrize("route", [*CLOSED, "/adapters/x", "//adapters", "/adapters/", "/v1//load_lora_adapter"])
def test_routes_that_load_and_unload_are_closed_to_everybody(route: str) -> None:
    assert ask(KEYED, route, f"Bearer {KEY}") == 403
    assert ask(LOOPBACK, route) == 403
    assert ask(LOOPBACK, f"/root{route}", root="/root") == 403


def test_a_route_that_would_answer_by_the_base() -> None:
    """vLLM takes the model of /invocations from SageMaker's header, and the base where that is missing."""
    headers, name = [("Authorization", f"Bearer {KEY}")], "X-Amzn-SageMaker-Adapter-Identifier"
    guard = Guard(inner, KEYED)
    assert status(guard, headers, "/invocations") == status(guard, [*headers, (name, "")], "/invocations/") == 400
    assert status(guard, [*headers, (name, "a")], "/invocations") == 200
    assert status(guard, [], "/invocations") == 401


def test_a_line_end_opens_no_route() -> None:
    """Starlette answers /x%0A by the route /x."""
    routing = pytest.importorskip("starlette.routing", reason="vLLM is not installed")
    scope = {"type": "http", "method": "GET", "path": "/sleep\n"}
    assert routing.Route("/sleep", lambda _: None).matches(scope)[0] is routing.Match.FULL
    assert ask(LOOPBACK, scope["path"]) == 403


def test_opened_routes() -> None:
    environ = KEYED | {"GORA_SERVE_OPEN_ROUTES": "/health,/metrics"}
    assert ask(environ, "/health") == ask(environ, "/metrics/") == 200
    assert ask(environ, "/metrics/x") == ask(environ, "/v1/models") == ask(environ, "/healthy") == 401


def test_websockets_are_closed_without_the_key() -> None:
    assert ask(KEYED, "/v1/realtime", kind="websocket") == 1008
    assert ask(KEYED, "/v1/realtime", f"Bearer {KEY}", kind="websocket") == 200


def test_the_life_of_the_server_is_let_through() -> None:
    assert ask({"GORA_SERVE_GUARD": "key", "VLLM_API_KEY": KEY}, "", kind="lifespan") == 200


@pytest.mark.parametrize("environ", [{}, {"GORA_SERVE_GUARD": "key"}, {"GORA_SERVE_GUARD": "x"}])
def test_a_guard_that_is_told_nothing_lets_nothing_through(environ: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="needs a key"):
        Guard(inner, environ)


def key_file(folder: Path, text: str = f"{KEY}\n\n{OTHER}\n", mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_keys_out_of_a_file(tmp_path: Path) -> None:
    told = guard_environment("0.0.0.0", key_file(tmp_path), (), {})
    assert KEY not in repr(told)
    for key in (KEY, OTHER):
        assert ask(told, "/v1/models", f"Bearer {key}") == 200
    assert ask(told, "/v1/models", "Bearer third-key-0123456789") == 401
    third = "third-key-0123456789"
    assert read_keys({"VLLM_API_KEY": third}, key_file(tmp_path)) == (third, KEY, OTHER)


def test_the_key_of_the_environment_beside_a_file(tmp_path: Path) -> None:
    """vLLM's own check of /v1 knows VLLM_API_KEY alone, so beside a file it must not see it."""
    third = "third-key-0123456789"
    file = key_file(tmp_path)
    stray = {"GORA_SERVE_API_KEY": "fourth-key-0123456789", "GORA_SERVE_API_KEY_FILE": "/no/such/file"}
    assert inner_environment(stray, file) == inner_environment(stray, None) == {}
    told = inner_environment({"VLLM_API_KEY": third} | stray, file) | guard_environment("0.0.0.0", file, (), {})
    assert "VLLM_API_KEY" not in told
    for key in (KEY, OTHER, third):
        assert ask(told, "/v1/models", f"Bearer {key}") == 200
    assert ask(told, "/v1/models", "Bearer fourth-key-0123456789") == 401
    alone = {"VLLM_API_KEY": third}
    assert inner_environment(alone, None) == alone, "vLLM's own check stays beside ours"


@pytest.mark.parametrize("key", ["short", f"{KEY} {KEY}", f"{KEY}\n", "ключ-0123456789abcdef"])
def test_keys_of_the_environment_that_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="GS-289") as caught:
        guard_environment("127.0.0.1", None, (), {"VLLM_API_KEY": key})
    assert key not in str(caught.value)


def test_while_it_stops(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    told = KEYED | {"GORA_SERVE_STATE": str(state)}
    state.write_text('{"ready": true}')
    assert ask(told, "/v1/completions", f"Bearer {KEY}") == ask(told, "/health", f"Bearer {KEY}") == 200
    state.write_text('{"ready": true, "stopping": true}')
    assert ask(told, "/v1/completions", f"Bearer {KEY}") == ask(told, "/health", f"Bearer {KEY}") == 503
    assert ask(told, "/metrics", f"Bearer {KEY}") == ask(told, "/gora-serve/status", f"Bearer {KEY}") == 200
    assert ask(told, "/v1/completions") == 401


@pytest.mark.parametrize(
    ("text", "mode", "code"),
    [("", 0o600, "GS-289"), ("short\n", 0o600, "GS-289"), (f"{KEY} {KEY}\n", 0o600, "GS-289"),
     (f"{KEY}\n" * 3000, 0o600, "GS-289"), (f"{KEY}\n", 0o644, "GS-5354"), (f"{KEY}\n", 0o660, "GS-5354")],
)  # fmt: skip
def test_files_with_keys_that_are_refused(tmp_path: Path, text: str, mode: int, code: str) -> None:
    with pytest.raises(GoraError, match=code) as caught:
        read_keys({}, key_file(tmp_path, text, mode))
    assert KEY not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="GS-5353"):
        read_keys({}, tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", ""])
def test_another_address_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="GS-283"):
        guard_environment(host, None, (), {})
    assert guard_environment(host, None, (), {"VLLM_API_KEY": KEY})["GORA_SERVE_GUARD"] == "key"
    assert guard_environment("127.0.0.1", None, (), {})["GORA_SERVE_GUARD"] == "loopback"


@pytest.mark.parametrize("route", ["/v1/models", "/invocations", "/", "", "/health,/v1", "health"])
def test_only_routes_that_do_no_work_can_be_opened(route: str) -> None:
    with pytest.raises(UsageError, match="GS-290"):
        guard_environment("127.0.0.1", None, (route,), {})


def test_a_file_that_changes_under_a_server_degrades_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from gora_serve.integrity.reading import stamps

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"as it was")
    with FileWatch(stamps([file]), every=0.0) as watch:
        environ = LOOPBACK | watch.environment
        assert ask(environ, "/v1/models") == ask(environ, "/health") == 503, "nobody is served before it is ready"
        watch.look()
        assert watch.degraded is None, "nothing is looked at before it is ready"
        watch.started()
        watch.look()
        assert ask(environ, "/health", method="GET") == 200
        file.write_bytes(b"something else")
        watch.look()
        watch.look()
        assert ask(environ, "/health", method="GET") == ask(environ, "/ping") == 503
        assert ask(environ, "/v1/models") == 200
        state = json.loads(Path(watch.environment["GORA_SERVE_STATE"]).read_text())
        assert str(file) in state["degraded"]
        assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert not Path(watch.environment["GORA_SERVE_STATE"]).parent.exists()


def test_a_file_that_cannot_be_looked_at_ends_no_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gora_serve.serving import watch as module

    def stale(_: object) -> None:
        raise OSError(116, "Stale file handle")

    file = tmp_path / "model.safetensors"
    with FileWatch({file: (1,)}, every=0.0) as watch:
        watch.started()
        with monkeypatch.context() as patched:
            patched.setattr(module, "check_unchanged", stale)
            watch.look()
        assert watch.degraded is None, "nothing was seen to have changed"
        assert "Stale file handle" in caplog.text
        shutil.rmtree(watch.ledger.file.parent)  # as cleaners of temporary files do
        watch.look()
        assert ask(LOOPBACK | watch.environment, "/health", method="GET") == 503


def test_what_a_cleaner_of_temporary_files_takes_is_told_anew(tmp_path: Path) -> None:
    with FileWatch({tmp_path / "gone": (1,)}, every=0.0) as watch:
        watch.ledger.serves("base", [])
        watch.started()
        watch.look()
        shutil.rmtree(watch.ledger.file.parent)
        watch.look()
        assert ask(LOOPBACK | watch.environment, "/health", method="GET") == 503, "it is as degraded as it was"
        watch.ledger.file.unlink()
        watch.look()
        assert "base" in read_ledger(watch.ledger.file)["models"]


def test_a_guard_that_cannot_be_told_is_told_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FileWatch({tmp_path / "gone": (1,)}, every=0.0) as watch:
        watch.started()
        blocked = watch.ledger.file.parent / "state.tmp"
        blocked.mkdir()
        watch.look()
        assert watch.degraded is None
        assert "/health does not say so" in caplog.text
        blocked.rmdir()
        watch.look()
        assert ask(LOOPBACK | watch.environment, "/health", method="GET") == 503


def test_before_it_is_ready_only_its_parent_is_served() -> None:
    with FileWatch({}) as watch:
        environ = KEYED | watch.environment
        guard = Guard(inner, environ)
        assert status(guard, [("Authorization", f"Bearer {KEY}")]) == 503
        assert status(guard, [("Authorization", f"Bearer {KEY}"), ("X-Gora-Serve-Token", "x")]) == 503
        assert status(guard, [("Authorization", f"Bearer {KEY}"), ("X-Gora-Serve-Token", watch.token)]) == 200
        assert status(guard, [("X-Gora-Serve-Token", watch.token)]) == 401
        watch.started()
        assert status(guard, [("Authorization", f"Bearer {KEY}")]) == 200


def status(guard: Guard, headers: list[tuple[str, str]], path: str = "/v1/models") -> int:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    raw = [(name.encode(), value.encode()) for name, value in headers]
    asyncio.run(guard({"type": "http", "path": path, "headers": raw}, receive, send))
    return int(said[0]["status"])


def test_it_is_looked_at_every_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gora_serve.serving import watch as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with FileWatch({tmp_path / "gone": (1,)}) as watch:
        watch.started()
        now[0] += 3599
        watch.look()
        assert watch.degraded is None
        now[0] += 1
        watch.look()
        assert watch.degraded is not None


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [("/sleep", "/s", "/sleep"), ("/s/sleep", "/s", "/sleep"), ("/s/sleep", "/s/", "/sleep"), ("/s", "/s", "/"),
     ("//sleep/", "", "/sleep"), ("/s/sleep\n", "/s", "/sleep")],
)  # fmt: skip
def test_the_root_path_ends_at_a_slash(path: str, root: str, route: str) -> None:
    assert route_of({"path": path, "root_path": root}) == route
