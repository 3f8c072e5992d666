"""The same from the kernel's side: strace kills a forked command at its n-th system call of a kind, or makes it fail.

Catches what Python's own calls do not show: writes by C and Rust code, and calls of the C library.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from faults import KILL, Call
from world import Bench, Ended, start, wait

WRITING = (
    "write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "rename", "renameat", "renameat2", "mkdir",
    "mkdirat", "unlink", "unlinkat", "rmdir", "link", "linkat", "symlink", "symlinkat", "chmod", "fchmod",
)  # fmt: skip
OPENING = ("openat", "open", "creat")
_LINE = re.compile(r"(?:(?P<pid>\d+)\s+)?(?P<name>\w+)\((?P<rest>.*)")


def why_not() -> str | None:
    """Return why no process can be traced here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-e", "trace=fsync", "true"], capture_output=True, text=True)
    return f"tracing is not allowed: {done.stderr.strip()[-200:]}" if done.returncode else None


@dataclass(frozen=True)
class Point:
    """The `when`-th call of this name by the main thread (strace counts per name), and the line that it was."""

    name: str
    when: int
    line: str


def traced(bench: Bench, *options: str) -> tuple[Ended, str]:
    """Run the command under strace with these options; return how it ended, and the trace."""
    trace = bench.place / "trace"
    trace.unlink(missing_ok=True)
    gate, opened = os.pipe()
    child = start(bench.new_argv(), bench.place / "scratch", before=lambda: os.read(gate, 1))
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "0", "-o", str(trace), *options, "-p", str(child.pid)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    assert "attached" in said, said
    os.write(opened, b"1")
    ended = wait(child)
    tracer.communicate(timeout=30)
    os.close(gate)
    os.close(opened)
    return ended, trace.read_text(encoding="utf-8", errors="replace")


def points(bench: Bench, folder: Path | None = None) -> list[Point]:
    """The system calls of the command that write below its folder (or another one), in order."""
    place = str(folder or bench.folder)
    bench.reset()
    ended, trace = traced(bench, "-e", f"trace={','.join('?' + name for name in WRITING + OPENING)}")
    assert ended.status == 0, ended.stderr
    counts: dict[str, int] = {}
    found = []
    main = None
    for line in trace.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        main = main or match["pid"]
        if match["pid"] != main:
            continue  # a thread that reads: strace counts each by itself
        name = match["name"]
        counts[name] = counts.get(name, 0) + 1
        writes = name not in OPENING or "O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line
        if place in line and writes:
            found.append(Point(name, counts[name], line))
    return found


def order_of(found: list[Point], folder: Path) -> tuple[Call, ...]:
    """The same as counted calls, with the path that each is about."""
    names = {"openat": "open", "pwrite64": "pwrite", "rename": "replace", "unlinkat": "unlink", "mkdirat": "mkdir"}
    calls = []
    for point in found:
        paths = [path for path in re.findall(r'["<](/[^">]*)[">]', point.line) if path.startswith(str(folder))]
        name = names.get(point.name, point.name)
        inside = re.search(r'<(/[^>]*)>, "([^"/]+)"', point.line)
        if inside and point.name == "unlinkat":
            paths = ["/".join(inside.groups())]
        plain = name == "replace" and len(paths) > 1 and paths[1].endswith(".tmp")  # sets aside what is to be deleted
        calls.append(Call("rename" if plain else name, paths[-1] if name == "open" else paths[0]))
    return tuple(calls)


def befall(bench: Bench, point: Point, what: str | int) -> dict[str, object]:
    """As `Bench.point`, by strace."""
    bench.reset()
    how = "signal=KILL" if what == KILL else f"error={errno.errorcode[int(what)]}"
    ended, trace = traced(bench, "-e", f"trace={point.name}", "-e", f"inject={point.name}:{how}:when={point.when}")
    hit = next((line for line in trace.splitlines() if "(INJECTED)" in line), "")
    if what == KILL:
        hit = point.line
    if str(bench.folder) not in hit:
        return {"point": point, "state": "elsewhere", "wrong": []}  # the calls came in another order
    path = next((part for part in re.findall(r'["<]([^">]*)[">]', hit) if str(bench.folder) in part), "")
    name = {"unlinkat": "unlink", "mkdirat": "mkdir"}.get(point.name, point.name)
    ended = Ended(ended.status, ended.stderr, (), Call(name, path))
    state = bench.judge()
    wrong = [state] if state.startswith("torn") else []
    if what == KILL:
        wrong += [] if ended.status == -signal.SIGKILL or state == "new" else [f"not killed: {ended}"]
    else:
        wrong += bench.faults_of_error(ended, state)
    again = bench.retry()
    return {"point": point, "state": state.split(":")[0], "wrong": wrong + ([again] if again else [])}
