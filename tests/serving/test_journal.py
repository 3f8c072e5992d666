"""JSON logs: what is in a line, what the engine prints, and that no request and no key gets through."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.cli.main import main
from gora_serve.errors import RunError
from gora_serve.serving import engine, start
from gora_serve.serving.engine import serve_forever
from gora_serve.serving.journal import JsonLines, LogHandler, Pump, without_keys
from gora_serve.serving.meter import LOG_MARK
from gora_serve.serving.process import start_child
from serving.test_engine import STAND_IN, make_plan

KEY = "a-secret-key-0123456789"


def lines_of(text: bytes | str) -> list[dict[str, Any]]:
    """Every line is JSON, and has what every line has."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "event", "message"} <= line.keys() for line in found)
    return found


def pumped(script: str, *, keys: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], str | None]:
    """What a child prints, as lines, and what is told of its end."""
    stream = io.BytesIO()
    pump = Pump(JsonLines(stream), keys)
    child = start_child([sys.executable, "-c", script], {**os.environ, **pump.environment}, None, pump)
    child._process.wait()
    tail = child.tail()
    child.stop(5.0)
    return lines_of(stream.getvalue()), tail


def test_lines_of_the_engine() -> None:
    found, tail = pumped(
        "import sys\n"
        r"print('\x1b[36m(APIServer pid=1)\x1b[0m INFO 11-27 [a.py:1] started'); print(); print('WARNING x')"
        "\n"
        r"sys.stdout.flush(); sys.stderr.buffer.write(b'\xff\x00 half' + b'y' * 40000); print('a\rb\nValueError: why')"
    )
    assert [(line["event"], line["level"]) for line in found[:2]] == [("engine", "info"), ("engine", "warning")]
    assert found[0]["message"] == "(APIServer pid=1) INFO 11-27 [a.py:1] started"
    assert sum(line["message"].count("y") for line in found[2:]) == 40001  # with the one of "why"
    assert tail == "ValueError: why"


def test_a_warning_is_not_why_an_engine_died() -> None:
    _, tail = pumped(
        "print('(APIServer pid=1) WARNING 11-27 07:00:00 [a.py:1] this may raise `OSError: [Errno 24]`')\n"
        "print('(APIServer pid=1) ERROR 11-27 07:00:01 [a.py:2] EngineDeadError: it is dead')"
    )
    assert tail == "EngineDeadError: it is dead"


def test_an_event_of_ours_needs_the_mark() -> None:
    event = {"event": "request finished", "model": "a"}
    found, _ = pumped(
        "import json, os\n"
        f"mark, event = os.environ[{LOG_MARK!r}], {event!r}\n"
        "print(mark + json.dumps(event)); print(json.dumps(event)); print('x' + mark + json.dumps(event))\n"
        "print(mark + 'no JSON'); print(mark + json.dumps({**event, 'time': 'x'}))"
    )
    assert [line["event"] for line in found] == ["request finished", "engine", "engine", "engine", "engine"]
    assert found[0]["model"] == "a"


def test_keys_are_taken_out() -> None:
    found, tail = pumped(f"print('the key is {KEY}, {KEY}'); print('ValueError: {KEY}')", keys=(KEY,))
    assert found[0]["message"] == "the key is [key], [key]"
    assert KEY not in str(tail)


@given(st.text(alphabet="xy\n", max_size=60).map(lambda text: text.replace("y", KEY)), st.integers(1, 2 * len(KEY)))
def test_keys_are_taken_out_where_a_long_line_is_cut(text: str, longest: int) -> None:
    stream = io.BytesIO(text.encode())
    pieces = list(without_keys(iter(lambda: stream.readline(longest), b""), [KEY]))
    assert "".join(pieces) == text.replace(KEY, "[key]").replace("\n", "")


def test_a_key_that_begins_another() -> None:
    found, _ = pumped(f"print('{KEY}-and-more {KEY}')", keys=(KEY, f"{KEY}-and-more"))
    assert [line["message"] for line in found] == ["[key] [key]"]


def test_lines_are_whole_from_many_threads(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as stream:
        lines = JsonLines(stream)
        threads = [threading.Thread(target=lambda: [lines.tell("x", "y" * 5000) for _ in range(50)]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines_of((tmp_path / "log").read_bytes())) == 300


def test_a_full_disk_ends_nothing() -> None:
    with Path("/dev/full").open("wb", buffering=0) as stream:
        JsonLines(stream).tell("x", "y")


def test_what_modules_log_is_an_event() -> None:
    stream = io.BytesIO()
    record = logging.LogRecord("gora_serve.serving.watch", logging.ERROR, "f", 1, "DEGRADED: %s", ("x",), None)
    record.event = "degraded"
    LogHandler(JsonLines(stream)).emit(record)
    assert lines_of(stream.getvalue())[0] | {"time": ""} == {
        "time": "", "level": "error", "event": "degraded", "message": "DEGRADED: x",
    }  # fmt: skip


@pytest.mark.parametrize(("manners", "code"), [("early", "GS-781"), ("late", "GS-785")])
def test_an_engine_that_dies_is_told_with_its_last_lines(
    manners: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a log."""
    stream = io.BytesIO()
    monkeypatch.setattr(engine, "UNREADY", 0.5)
    with pytest.raises(RunError, match=code) as caught:
        serve_forever(make_plan(manners), pump=Pump(JsonLines(stream)))
    if manners == "early":
        assert "OutOfMemory: the reason" in caught.value.what
        assert [line["message"] for line in lines_of(stream.getvalue())] == ["first line", "OutOfMemory: the reason"]


SERVE = r"""
import ast, sys
from pathlib import Path
from gora_serve.cli.main import main
from gora_serve.serving import start
from gora_serve.serving.plan import ServePlan

argv, url = ast.literal_eval(sys.argv[1])
plan = ServePlan(tuple(argv), {}, (), Path("."), (), url, ("base", "a", "b"), 60.0, 5.0)
start.prepare = lambda *_, **__: (plan, ["a warning"])
sys.exit(main(["serve", "base", *sys.argv[2:]]))
"""


def serve(manners: str, *words: object) -> subprocess.Popen[str]:
    """The command with a stand-in for vLLM; what it says is on standard error."""
    plan = make_plan(manners)
    command = [sys.executable, "-c", SERVE, repr((plan.argv, plan.url)), "--log-format", "json", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_life_of_a_server_as_events(tmp_path: Path) -> None:
    log = tmp_path / "engine.jsonl"
    with serve("chatty", "--log", log) as running:
        assert running.stderr is not None
        told = []
        for line in running.stderr:
            told.append(json.loads(line))
            if told[-1]["event"] == "ready":
                running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 143
        assert running.stdout is not None
        assert running.stdout.read() == ""
    assert [line["event"] for line in told] == ["warning", "start", "ready", "stopping", "stop"]
    assert told[0]["message"] == "warning: a warning"
    assert told[2]["models"] == ["base", "a", "b"]
    assert (told[3]["seconds"], told[4]["code"]) == (5.0, 143)
    assert [line["message"] for line in lines_of(log.read_bytes())] == ["INFO a line of the engine"]


def test_an_error_is_an_event_too() -> None:
    with serve("early") as running:
        _, err = running.communicate(timeout=60)
    told = lines_of(err)
    assert running.returncode == 7
    assert [line["event"] for line in told] == ["warning", "start", "engine", "engine", "failed"]
    assert (told[-1]["code"], told[-1]["level"]) == ("GS-781", "error")
    assert STAND_IN not in err


def test_an_error_tells_no_token_of_the_hub(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    token = f"hf_{'a1' * 17}"

    def prepare(*_: Any, **__: Any) -> None:
        raise RunError(f"the hub said {token}", code="GS-7000")

    monkeypatch.setattr(start, "prepare", prepare)
    for words in ([], ["--dry-run", "--json"]):
        assert main(["serve", "base", "--log-format", "json", *words]) == 7
        out, told = capfd.readouterr()
        assert [line["event"] for line in lines_of(told)] == ["failed"]
        assert token not in out + told
        assert (json.loads(out)["error"]["code"] if words else out) == ("GS-7000" if words else "")


def test_progress_of_the_proof_is_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = (
        "from gora_serve import parity\n"
        "from gora_serve.progress import Progress\n"
        "parity.check_parity = lambda *_, listen, **__: listen(Progress('parity', 1, 1)) or []\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SERVE", proof + SERVE)
    told = []
    with serve("polite", "--verify", "--log", tmp_path / "log") as running:
        assert running.stderr is not None
        for line in running.stderr:
            told.append(line)
            if '"event": "ready"' in line:
                running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 143
    assert [line["event"] for line in lines_of("".join(told))] == ["warning", "start", "ready", "stopping", "stop"]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with serve("polite", "--log", tmp_path / "no" / "log") as running:
        _, err = running.communicate(timeout=60)
    assert running.returncode == 5
    assert lines_of(err)[-1]["code"] == "GS-584"
