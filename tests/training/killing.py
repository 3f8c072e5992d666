"""Runs in a forked child that dies by SIGKILL: at a file operation on the run's folder, or after some seconds.

The fork has torch and all tables loaded, so a killed run costs a second or two.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}  # audit events; os.replace is a rename too


def start(work: Callable[[], object], *, log: Path) -> int:
    """Fork a child that does the work and exits with 0, or 1 and a traceback in `log`. Returns its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads may hold locks
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        work()
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Return how the child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_after(seconds: float, work: Callable[[], object], *, log: Path) -> int:
    """Do the work in a child and kill it after some seconds. Returns how it ended."""
    pid = start(work, log=log)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


def killed_at(operation: int, work: Callable[[], object], *, folder: Path, log: Path) -> int:
    """Do the work in a child and kill it at its n-th file operation below `folder`, before it is done."""

    def counted() -> None:
        count_operations(folder, lambda number: number == operation and os.kill(os.getpid(), signal.SIGKILL))
        work()

    return wait(start(counted, log=log))


def operations_of(work: Callable[[], object], *, folder: Path, log: Path) -> int:
    """Do the work in a child and return how many file operations below `folder` it took."""
    found = log.with_suffix(".count")

    def counted() -> None:
        numbers = [0]
        count_operations(folder, lambda number: numbers.append(number))
        work()
        total = numbers[-1]
        found.write_text(str(total))

    assert wait(start(counted, log=log)) == 0, log.read_text()
    return int(found.read_text())


def count_operations(folder: Path, at: Callable[[int], object]) -> None:
    """Call `at` with 1, 2, 3 ... before each file operation of this process below `folder` until `folder`/run is there.

    This holds for the life of the process.
    """
    number = 0
    place, published = str(folder), folder / "run"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        if event not in OPERATIONS or published.exists():
            return
        if any(isinstance(word, str | Path) and str(word).startswith(place) for word in arguments):
            number += 1
            at(number)

    sys.addaudithook(hook)


def content(run: Path) -> dict[str, object]:
    """What a run left that must not depend on whether it was interrupted: every file, without times and paths."""
    found: dict[str, object] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
        elif name == "run.json":
            value = json.loads(path.read_text())
            found[name] = (value["status"], value["base_after"], value["result"]["losses"], value["result"]["gamma"])
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
