"""The lock of an output: a file beside it that its writer holds. One of a dead process holds nothing up."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gora_serve.errors import OutputError
from gora_serve.integrity.targets import UNCHANGED

log = logging.getLogger(__name__)
GLANCE = 0.1  # seconds: longer than `is_locked` may hold a lock that is another's to take


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` for as long as the block runs; it is a file beside the target, removed at the end."""
    path = _place(target)
    fd = _lock(path, target)
    try:
        yield
    finally:
        _unlock(path, fd)


def is_locked(target: Path) -> bool:
    """Return whether a process holds the lock of `target`, or may hold it where that cannot be asked.

    Nothing is made: the lock is shared for a moment where nobody holds it.
    """
    try:
        fd = os.open(_place(target), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        return not isinstance(err, FileNotFoundError)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _place(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _unlock(path: Path, fd: int) -> None:
    """Remove the lock while it is still held: who opened it before sees another inode and tries again."""
    try:
        path.unlink(missing_ok=True)
    except OSError as err:  # the work is done or has its own error; a lock that nobody holds stops nobody
        log.warning("%s cannot be removed (%s); it holds nothing up, delete it", path, err.strerror)
    finally:
        os.close(fd)


def _lock(path: Path, target: Path) -> int:
    patience = time.monotonic() + GLANCE
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            if time.monotonic() < patience:
                os.close(fd)
                time.sleep(GLANCE / 20)
                continue
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            what = f"another process is writing this output, pid {holder}"
            raise OutputError(what, code="GS-602", file=target, kept=UNCHANGED) from err
        except BaseException:
            os.close(fd)
            raise
        if _is_open_file(path, fd):
            try:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
                _unlock(path, fd)
                raise
            return fd
        os.close(fd)


def _is_open_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def locks_hold(path: Path) -> bool:
    """Return whether a lock on a file at `path`, which is made, holds off a second one."""
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) for _ in range(2))
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system knows no locks
        return False
    else:
        return False
    finally:
        os.close(first)
        os.close(second)
