"""`gora-serve status` against real servers: ready, degraded, not ready, another one's, and none."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from serving.metered import KEY, Bench, bench, make_bench, reply, serving
from shell import Answer, gora_here

from gora_serve.serving.engine import free_port

__all__ = ["bench"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\nanother-key-0123456789\n")
    file.chmod(0o600)
    return file


def test_a_server_that_is_ready(bench: Bench, key_file: Path) -> None:
    for _ in range(3):
        bench.ask(model="a", stream=2)
    bench.ask(model="a", status=500)
    bench.ask(model="nobody", status=404)
    answer = gora_here("status", bench.url, "--api-key-file", key_file)
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0] == f"ready: {bench.url}"
    assert lines[1] == "  requests for (unknown): 1, 1 failed"
    assert lines[2].startswith("  last error of a: 5xx, ")
    what, traffic = ([cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│ a "))
    assert what[2:] == ["a" * 12, "unit", "8", "slot"]
    assert traffic[1:5] == ["4", "1", "20", "12"]
    assert traffic[5].endswith(" s")
    assert KEY not in answer.out


def test_as_json_with_the_key_of_the_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    bench.ask(model="b")
    for words in ((bench.url,), (f"{bench.url}/v1/",), (bench.url.removeprefix("http://"),)):
        answer = gora_here("status", *words, "--json")
        assert answer.code == 0
        told = json.loads(answer.out)
        assert (told["url"], told["state"], told["reason"]) == (bench.url, "ready", None)
        assert [model["name"] for model in told["models"]] == ["base", "a", "b", "c"]
        assert told["models"][2]["requests"] == {"200": 1}


def test_the_wrong_key_and_none(bench: Bench, key_file: Path) -> None:
    answer = gora_here("status", bench.url)
    assert (answer.code, answer.gs, answer.out) == (2, "GS-2470", "")
    assert "wants a key" in answer.err
    key_file.write_text("a-wrong-key-0123456789\n")
    answer = gora_here("status", bench.url, "--key-file", key_file)
    assert (answer.code, answer.gs) == (2, "GS-2470")
    assert "wrong-key" not in answer.err


def test_a_server_that_is_degraded(bench: Bench, key_file: Path) -> None:
    bench.watch.tell(degraded="a verified file changed: x")
    answer = gora_here("status", bench.url, "--api-key-file", key_file)
    assert (answer.code, answer.gs) == (1, "GS-1470")
    assert answer.out.splitlines()[0] == f"degraded: {bench.url}: a verified file changed: x"
    assert "│ a " in answer.out


def test_a_server_that_is_stopping(bench: Bench, key_file: Path) -> None:
    bench.watch.tell(stopping=True)
    answer = gora_here("status", bench.url, "--api-key-file", key_file)
    assert (answer.code, answer.gs) == (1, "GS-1470")
    assert answer.out.startswith(f"stopping: {bench.url}: what had begun is still answered")
    assert "a restart" not in answer.err


def test_a_key_of_the_environment_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", f"{KEY}\n")
    answer = gora_here("status", "http://127.0.0.1:1")
    assert (answer.code, answer.gs) == (2, "GS-289")
    assert KEY not in answer.err


def test_a_server_that_is_not_ready(key_file: Path) -> None:
    with make_bench() as made:
        answer = gora_here("status", made.url, "--api-key-file", key_file, "--json")
    assert answer.code == 1
    told = json.loads(answer.out)
    assert (told["state"], told["reason"], told["models"]) == ("not ready", "the adapters are being checked", None)
    assert (told["error"]["code"], told["exit_code"]) == ("GS-1470", 1)


def test_an_engine_that_is_dead(bench: Bench, key_file: Path) -> None:
    bench.app.healthy = False
    answer = gora_here("status", bench.url, "--api-key-file", key_file)
    assert answer.code == 1
    assert answer.out.startswith(f"degraded: {bench.url}: the engine is not healthy")


def asked(application: Any) -> Answer:
    with serving(application) as url:
        return gora_here("status", url)


def test_another_server() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, 404 if scope["path"].startswith("/gora") else 200, {"detail": "Not Found"})

    answer = asked(other)
    assert (answer.code, answer.gs) == (7, "GS-7470")


def test_a_redirection_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    seen = []

    async def target(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await reply(send, 200, {})

    with serving(target) as elsewhere:

        async def redirecting(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"location", elsewhere.encode())]
            await send({"type": "http.response.start", "status": 302, "headers": headers})
            await send({"type": "http.response.body", "body": b""})

        answer = asked(redirecting)
    assert (answer.code, answer.gs, seen) == (7, "GS-7470", [])


def test_nobody_answers() -> None:
    answer = gora_here("status", f"http://127.0.0.1:{free_port()}")
    assert (answer.code, answer.gs) == (5, "GS-5470")
    with socket.socket() as silent:  # it takes connections, and closes them
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(20)
        thread = threading.Thread(target=lambda: silent.accept()[0].close())
        thread.start()
        answer = gora_here("status", f"http://127.0.0.1:{silent.getsockname()[1]}")
        thread.join()
    assert (answer.code, answer.gs) == (5, "GS-5470")


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "file:///etc/passwd", "http://user:secret@x", "http://x:99999", "a b", "http://x\n"]
)
def test_addresses_that_are_none(url: str) -> None:
    answer = gora_here("status", url)
    assert (answer.code, answer.gs) == (2, "GS-2471")
    assert "secret" not in answer.err
