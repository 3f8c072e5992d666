"""Reading files by descriptor: regular files only, in bounded pieces, and with proof that they stood still meanwhile.

The only place of this room that opens an input. Operating system errors become MachineError here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gora_serve.errors import InputError, MachineError, MismatchError

PIECE = 1 << 18  # bytes per read: the memory that a thread holds; 1 MiB was 8 % slower for small tensors


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open `path` for reading and yield its descriptor; on leaving, check that the file is as it was on entering.

    Raises MachineError (GS-501 missing, GS-502 unreadable), InputError (GS-334, not a regular file) and MismatchError
    (GS-101) when size, times or inode changed while it was open.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: a pipe must not hang us
    except FileNotFoundError as err:
        raise MachineError(
            "this file does not exist", code="GS-501", file=path, hint="check the path; the folder may not be whole"
        ) from err
    except OSError as err:
        raise unreadable(path, err) from err
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise InputError(
                "this is not a regular file",
                code="GS-334",
                file=path,
                hint="give a file on disk, no device and no pipe",
            )
        yield fd
        if identity(os.fstat(fd)) != identity(before):
            raise changed_while_reading(path)
    finally:
        os.close(fd)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from another one, and from what it was before somebody wrote to it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stamps(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Return what changes about each file when it is written to, for `check_unchanged`."""
    return {path: identity(path.stat()) for path in paths}


def check_unchanged(before: Mapping[Path, tuple[int, ...]]) -> None:
    """Raise MismatchError (GS-101) for the first file that is another one than when its stamp was taken."""
    for path, stamp in before.items():
        if not path.exists() or identity(path.stat()) != stamp:
            raise changed_while_reading(path)


def changed_while_reading(path: Path) -> MismatchError:
    """Return the error for a file that another process wrote to, to be raised by the caller."""
    hint = "run again when nothing writes to it"
    return MismatchError("this file changed while it was being read", code="GS-101", file=path, hint=hint)


def unreadable(path: Path, err: OSError) -> MachineError:
    return MachineError(
        f"this file cannot be read: {err.strerror or err}", code="GS-502", file=path,
        hint="check the path and its permissions, and those of its folder",
    )  # fmt: skip


@contextmanager
def naming_inputs() -> Iterator[None]:
    """Turn an operating system's error about a file into MachineError (GS-502), for work that only reads."""
    try:
        yield
    except OSError as err:
        if isinstance(err, BrokenPipeError) or not isinstance(err.filename, str | bytes | os.PathLike):
            raise
        raise unreadable(Path(os.fsdecode(err.filename)), err) from err


def size_of(fd: int) -> int:
    """Return the size in bytes of the open file."""
    return os.fstat(fd).st_size


def pieces(fd: int, begin: int, end: int, *, path: Path) -> Iterator[memoryview]:
    """Yield the bytes [begin, end) in pieces of at most 256 KiB; each is valid only until the next one is taken.

    Safe in several threads on one descriptor. `path` is for messages only.
    """
    buffer = memoryview(bytearray(min(PIECE, max(end - begin, 0))))
    while begin < end:
        try:
            count = os.preadv(fd, [buffer[: end - begin]], begin)
        except OSError as err:
            raise unreadable(path, err) from err
        if count == 0:
            raise changed_while_reading(path)
        yield buffer[:count]
        begin += count


def read_into(fd: int, begin: int, buffer: bytearray, *, path: Path) -> None:
    """Fill `buffer` with the bytes of the open file from `begin` on. Safe in several threads on one descriptor."""
    view = memoryview(buffer)
    while view:
        try:
            count = os.preadv(fd, [view], begin)
        except OSError as err:
            raise unreadable(path, err) from err
        if count == 0:
            raise changed_while_reading(path)
        view, begin = view[count:], begin + count


def read_range(fd: int, begin: int, end: int, *, path: Path) -> bytes:
    """Return the bytes [begin, end) of the open file; no more memory than they have, where they come at one read."""
    try:
        data = os.pread(fd, end - begin, begin) if begin < end else b""
    except OSError as err:
        raise unreadable(path, err) from err
    rest = pieces(fd, begin + len(data), end, path=path) if begin + len(data) < end else ()
    return data + b"".join(bytes(piece) for piece in rest) if rest else data
