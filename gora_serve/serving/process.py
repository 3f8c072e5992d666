"""One child process with everything that it starts, in a session of its own: start it, look at it, end all of it.

The session makes "no process left behind" checkable: every descendant that did not leave it on purpose carries
the child's process id as its session id. Signals and readiness are `engine`'s subject.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from gora_serve.errors import MachineError
from gora_serve.serving.journal import Pump

TAIL_BYTES = 256 * 1024
_REASON = re.compile(r"\b\w*(Error|Exception|OutOfMemory|Killed)\b:? ?.+")
_CALM = re.compile(r"\b(DEBUG|INFO|WARNING) \d\d-\d\d ")  # how vLLM begins its lines
ORPHAN_GRACE = 10.0  # seconds that an engine gets to end by itself after our own process was killed
# Runs in the child, then becomes the engine. Before that it leaves a watcher behind, in a session of its own, that
# reads a pipe which only we can write to. End of file means that we were killed: the watcher then ends the whole group.
# PR_SET_PDEATHSIG does not do: it reaches one process, and vLLM's does not listen while it loads.
_LAUNCH = """
import os, signal, sys, time
pipe, grace, leader = int(sys.argv[1]), float(sys.argv[2]), os.getpid()

def send(act, number):
    try:
        act(leader, number)
    except OSError:
        os._exit(0)

if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if os.read(pipe, 1):
        os._exit(0)
    try:
        os.kill(leader, signal.SIGTERM)
    except OSError:
        pass
    end = time.monotonic() + grace
    while time.monotonic() < end:
        send(os.killpg, 0)
        time.sleep(0.1)
    send(os.killpg, signal.SIGKILL)
    os._exit(0)
os.wait()
os.close(pipe)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Child:
    """A running command and its descendants."""

    def __init__(
        self, process: subprocess.Popen[bytes], lifeline: int, log: Path | None, log_start: int, pump: Pump | None
    ) -> None:
        self._process = process
        self._lifeline: int | None = lifeline
        self.log = log
        self._log_start = log_start
        self._pump = pump

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the exit code of the command, or None while it runs."""
        return self._process.poll()

    def tail(self, lines: int = 8) -> str | None:
        """Return the last distinct lines of the output that name an error, else its last lines.

        None where it was neither logged nor pumped, or the log is no longer where it was (logrotate).
        """
        told = self._last_lines()
        if told is None:
            return None
        reasons = [match[0] for line in told if not _CALM.search(line) and (match := _REASON.search(line))]
        return " | ".join(list(dict.fromkeys(reasons or told))[-lines:])

    def _last_lines(self) -> list[str] | None:
        if self._pump is not None:
            return self._pump.last()
        if self.log is None:
            return None
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(self._log_start, self.log.stat().st_size - TAIL_BYTES))
                text = stream.read().decode(errors="replace")
        except OSError:
            return None
        return [line.strip() for line in text.splitlines() if line.strip()]

    def members(self) -> tuple[int, ...]:
        """Return the live processes of the child's session."""
        return session_members(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every process of the child's group; a group that is gone is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End every process of the session at once."""
        self.send(signal.SIGKILL)
        for member in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)

    def stop(self, timeout: float) -> bool:
        """Ask once, wait until all of the session is gone, then kill what is left. True when nothing had to be killed.

        Returns only when no process is left. Only the first process is asked: vLLM's workers would end at once on
        SIGTERM, while it still waits for running requests. What outlived it is asked in its place.
        """
        if self.exit_code() is None:
            self._process.send_signal(signal.SIGTERM)
        else:
            self.send(signal.SIGTERM)
        try:
            polite = self._wait_empty(timeout)
        except BaseException:  # a second Ctrl-C: no more waiting
            self.kill()
            raise
        while not self._wait_empty(0.0):
            self.kill()
            self._wait_empty(1.0)
        self._process.wait()
        self._dismiss_watcher()
        return polite

    def _dismiss_watcher(self) -> None:
        if self._lifeline is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._lifeline, b"x")
            os.close(self._lifeline)
            self._lifeline = None

    def _wait_empty(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            if self._process.poll() is not None and not self.members():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def start_child(
    argv: Sequence[str], environment: Mapping[str, str], log: Path | None, pump: Pump | None = None
) -> Child:
    """Start `argv` in a new session with exactly this environment, standard input closed.

    Its output goes through `pump`, or else is appended to `log`, or passed through to our standard error, so that
    standard output stays ours. If this process is killed, the child and its descendants are ended too.
    """
    pipe, lifeline = os.pipe()
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(pipe), str(ORPHAN_GRACE), *argv]
    try:
        with contextlib.ExitStack() as stack:
            stream: int | BinaryIO = 2 if log is None else stack.enter_context(open_log(log))
            start = 0 if log is None else log.stat().st_size
            if pump is not None:
                stream = pump.open()
                stack.callback(os.close, stream)
            process = subprocess.Popen(
                launch, env=dict(environment), stdin=subprocess.DEVNULL, stdout=stream, pass_fds=(pipe,),
                stderr=subprocess.STDOUT if log or pump else None, start_new_session=True,
            )  # fmt: skip
    except BaseException as err:
        os.close(lifeline)
        if not isinstance(err, OSError):
            raise
        what, hint = f"cannot start the engine: {err.strerror}", "check the installation of vLLM"
        raise MachineError(what, code="GS-584", hint=hint) from err
    finally:
        os.close(pipe)
    return Child(process, lifeline, log, start, pump)


def open_log(log: Path) -> BinaryIO:
    """Open the file that the engine's output is appended to. Raises MachineError (GS-584)."""
    try:
        return log.open("ab")
    except OSError as err:
        what = f"the engine's log cannot be written: {err.strerror}"
        raise MachineError(what, code="GS-584", file=log, hint="check --log") from err


def session_members(session: int) -> tuple[int, ...]:
    """Return the processes of a session that have not ended (zombies have), from /proc.

    Where there is no /proc, the answer is the session's leader while its process group exists.
    """
    proc = Path("/proc")
    if not (proc / "self/stat").exists():
        return (session,) if _group_exists(session) else ()
    found = []
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            fields = _stat_fields(entry / "stat")
            if fields and fields[0] not in ("Z", "X") and fields[3] == str(session):
                found.append(int(entry.name))
    return tuple(sorted(found))


def _stat_fields(file: Path) -> list[str]:
    """Return the fields of /proc/N/stat from the state on: state, parent, group, session ..."""
    try:
        text = file.read_text(errors="replace")
    except OSError:  # ended while we looked
        return []
    return text[text.rindex(")") + 2 :].split()


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
