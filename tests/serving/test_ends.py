"""How a server ends, by the command line, with the process table as witness: a stand-in for vLLM, and real signals."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gora_serve.serving.engine import free_port
from gora_serve.serving.process import session_members

# Answers after a while; on SIGTERM it takes no more requests, and ends when the last one is answered.
ENGINE = r"""
import json, os, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("INFO the engine has started", file=sys.stderr, flush=True)


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            print("ERROR: about to answer slowly", file=sys.stderr, flush=True)
            time.sleep(3)
        body = json.dumps({"data": [{"id": "base"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for those that are at work


server = Server(("127.0.0.1", int(sys.argv[1])), Answer)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()
worker.terminate()
"""
COMMAND = r"""
import sys
from pathlib import Path
from gora_serve.cli.main import main
from gora_serve.serving import start
from gora_serve.serving.plan import ServePlan

engine, port = sys.argv[1:3]
argv = (sys.executable, "-c", engine, port)
plan = ServePlan(argv, {}, (), Path("."), (), f"http://127.0.0.1:{port}", ("base",), 60.0, 10.0)
start.prepare = lambda *_, **__: (plan, [])
sys.exit(main(["serve", "base", *sys.argv[3:]]))
"""


JSON = ("--log-format", "json")


class Served:
    """A `gora-serve serve` that is ready."""

    def __init__(self, process: subprocess.Popen[str], url: str, session: int) -> None:
        self.process, self.url, self.session = process, url, session
        self.pid = session  # the engine's first process leads its session

    def ended(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        err = self.process.stderr.read()
        code = self.process.wait(timeout=60)
        assert session_members(self.session) == (), "an orphan"
        return code, err


@contextlib.contextmanager
def serve(*words: object) -> Iterator[Served]:
    port = free_port()
    command = [sys.executable, "-c", COMMAND, ENGINE, str(port), *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            for line in running.stderr:
                if "ready: http" in line or '"event": "ready"' in line:
                    break
            session = next(child for child in children(running.pid) if len(session_members(child)) == 2)
            yield Served(running, f"http://127.0.0.1:{port}", session)
        finally:
            running.kill()


def children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.parametrize("words", [(), JSON])
def test_requests_under_way_are_answered_on_sigterm(words: tuple[str, ...]) -> None:
    answers: list[int] = []

    def ask(url: str) -> None:
        with urllib.request.urlopen(f"{url}/slow", timeout=60) as response:
            answers.append(response.status)

    with serve(*words) as served:
        asking = [threading.Thread(target=ask, args=(served.url,)) for _ in range(4)]
        for thread in asking:
            thread.start()
        time.sleep(1)
        served.process.send_signal(signal.SIGTERM)
        code, _ = served.ended()
        for thread in asking:
            thread.join()
    assert code == 143
    assert answers == [200] * 4


def ask_in_vain(url: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(f"{url}/slow", timeout=60):
        pass


@pytest.mark.parametrize("words", [("--log", "LOG"), JSON, (*JSON, "--log", "LOG")])
def test_a_killed_engine_is_told_with_its_last_lines(words: tuple[str, ...], tmp_path: Path) -> None:
    words = tuple(str(tmp_path / "log") if word == "LOG" else word for word in words)
    with serve(*words) as served:
        asking = threading.Thread(target=ask_in_vain, args=(served.url,))
        asking.start()
        time.sleep(1)
        os.kill(served.pid, signal.SIGKILL)
        code, err = served.ended()
        asking.join()
    assert code == 7
    assert "GS-785" in err
    assert "exit -9" in err
    assert "about to answer slowly" in err


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        command = [sys.executable, "-c", COMMAND, ENGINE, str(other.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5
    assert "error[GS-581]" in done.stderr
    assert "the engine has started" not in done.stderr
