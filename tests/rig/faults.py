"""Counts the calls of this process that write, and at one of them kills it or makes the call fail.

For a forked child, for the rest of its life: calls are replaced in `os`, `io` and where the product calls the C
library. Without strace this is all; with it the same points are taken from the kernel's side (traced.py).
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gora_serve.integrity import publishing

BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate", "link", "symlink", "chmod", "rename", "replace")
BY_DESCRIPTOR = ("write", "pwrite", "fsync", "fdatasync", "ftruncate")
REMOVALS = ("unlink", "remove", "rmdir")
KILL = "kill"


@dataclass(frozen=True)
class Fault:
    """What befalls the `when`-th counted call (from 1): KILL, or an errno that it fails with instead of being made."""

    when: int
    what: str | int


@dataclass(frozen=True)
class Call:
    """One counted call: its name, and the path it is about."""

    name: str
    path: str


@dataclass
class Counter:
    """The calls so far that concern `folder` and paths below it, in order; the fault, when its turn comes."""

    folder: Path
    fault: Fault | None = None
    report: int = -1  # a descriptor for the call that failed
    calls: list[Call] = field(default_factory=list)

    def at(self, name: str, path: str) -> None:
        if path != str(self.folder) and not path.startswith(f"{self.folder}/"):
            return
        self.calls.append(Call(name, path))
        if self.fault is None or len(self.calls) != self.fault.when:
            return
        _write(self.report, json.dumps([name, path]).encode())
        if isinstance(self.fault.what, int):
            raise OSError(self.fault.what, os.strerror(self.fault.what), path)
        os.kill(os.getpid(), signal.SIGKILL)


_write = os.write  # the real one


def install(counter: Counter) -> None:
    """Count from now on. There is no way back: for a child that ends soon."""
    for name in BY_PATH:
        setattr(os, name, _by_path(counter, name, getattr(os, name)))
    for name in BY_DESCRIPTOR:
        setattr(os, name, _by_descriptor(counter, name, getattr(os, name)))
    os.open = _opening(counter, os.open)  # type: ignore[assignment]
    publishing.renameat2 = _renaming(counter, publishing.renameat2)
    io.open = builtins.open = _streams(counter, io.open)  # type: ignore[assignment]
    os.fdopen = lambda fd, *args, **options: io.open(fd, *args, **options)  # type: ignore[assignment]


def _path_of(path: Any, dir_fd: int | None = None) -> str:
    if isinstance(path, int):
        return _path_of_descriptor(path)
    text = os.fsdecode(path)
    if os.path.isabs(text):
        return text
    return f"{_path_of_descriptor(dir_fd) if dir_fd is not None else os.getcwd()}/{text}"


def _path_of_descriptor(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _by_path(counter: Counter, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **options: Any) -> Any:
        counter.at(name, _path_of(path, options.get("dir_fd", options.get("src_dir_fd"))))
        return real(path, *args, **options)

    return call


def _by_descriptor(counter: Counter, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(fd: int, *args: Any) -> Any:
        counter.at(name, _path_of(fd))
        return real(fd, *args)

    return call


def _opening(counter: Counter, real: Callable[..., int]) -> Callable[..., int]:
    def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            counter.at("open", _path_of(path, dir_fd))
        return real(path, flags, mode, dir_fd=dir_fd)

    return call


def _renaming(counter: Counter, real: Callable[..., bool]) -> Callable[..., bool]:
    def call(source: Path, target: Path, flags: int) -> bool:
        counter.at("renameat2", str(source))
        return real(source, target, flags)

    return call


class _Counted(io.FileIO):
    """A raw file whose writes are counted; its own opening was."""

    counter: Counter

    def write(self, data: Any, /) -> int:
        self.counter.at("write", str(self.name) if isinstance(self.name, str) else _path_of(self.fileno()))
        return super().write(data)


def _streams(counter: Counter, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *more: Any, **options: Any) -> Any:
        path = _path_of(file)
        if not set(mode) & set("wax+") or not path.startswith(f"{counter.folder}/") or "+" in mode:
            return real(file, mode, buffering, encoding, *more, **options)
        if not isinstance(file, int):
            counter.at("open", path)
        raw = _Counted(file if isinstance(file, int) else os.fsdecode(file), mode.replace("b", "").replace("t", ""))
        raw.counter = counter
        stream = io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8", *more, **options)

    return call
