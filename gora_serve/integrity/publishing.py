"""One atomic rename from a stage to its target, made durable; and what becomes of the old output."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
from pathlib import Path

from gora_serve.errors import MachineError, OutputError
from gora_serve.integrity.locks import locks_hold
from gora_serve.integrity.targets import UNCHANGED

log = logging.getLogger(__name__)

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def beside(target: Path, ending: str) -> Path:
    """Return a new name beside `target` that tells whose it is, and that the next run sweeps: "tmp" or "old"."""
    return target.with_name(f".{target.name}.gora-{os.getpid()}-{secrets.token_hex(4)}.{ending}")


def fsync_path(path: Path) -> None:
    """Wait until the file or folder at `path` is on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Wait until all files and folders below `folder` are on disk, and itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if not path.is_symlink():
                fsync_path(path)
        fsync_path(Path(place))


def sync_published(target: Path) -> None:
    """Make the rename that published `target` durable; MachineError (GS-506) says that the output is there anyway."""
    try:
        fsync_path(target.parent)
    except OSError as err:
        kept = "the new output is in place; it is not confirmed that it would survive a power failure"
        what = f"the folder cannot be synchronised: {err.strerror}"
        raise MachineError(what, code="GS-506", file=target, kept=kept) from err


def publish(stage: Path, target: Path, *, overwrite: bool) -> Path | None:
    """Rename `stage`, a folder or a file, to `target`; return where the old one is now, if there was one."""
    exists = os.path.lexists(target)
    if exists and not overwrite:
        raise _appeared(target)
    try:
        if renameat2(stage, target, _EXCHANGE if exists else _NOREPLACE):
            return stage if exists else None
    except FileExistsError as err:
        raise _appeared(target) from err
    if not exists:
        stage.rename(target)
        return None
    old = beside(target, "old")
    target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        old.rename(target)
        raise
    return old


def _appeared(target: Path) -> OutputError:
    what = "the output exists: another process wrote it meanwhile"
    hint = "choose another output, or pass --overwrite"
    return OutputError(what, code="GS-601", file=target, kept=UNCHANGED, hint=hint)


def renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call renameat2 and return True, or False where the C library or file system does not know it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    paths = os.fsencode(source), os.fsencode(target)
    if function(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(flags)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(source), None, os.fspath(target))


def remove_folder(folder: Path, target: Path) -> None:
    """Delete a folder beside `target`, under a name that the next run sweeps: half of it is never taken for a whole."""
    aside = beside(target, "tmp")
    folder.rename(aside)
    try:
        shutil.rmtree(aside)
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(aside, ignore_errors=True)
        raise


def delete_old(old: Path, target: Path) -> None:
    """Delete what `publish` set aside; it is no error of the new output where that cannot be done."""
    try:
        remove_folder(old, target)
    except OSError as err:
        log.warning("the new output is in place, but the old one cannot be removed from %s: %s", old, err.strerror)


def probe_folder(folder: Path) -> tuple[bool, bool]:
    """Return whether folders can be exchanged atomically in `folder`, and whether a lock there holds off a second one.

    Writes a folder of its own and removes it. Raises OSError where it cannot.
    """
    place = folder / f".gora-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    place.mkdir()
    try:
        (place / "a").mkdir()
        (place / "b").mkdir()
        return renameat2(place / "a", place / "b", _EXCHANGE), locks_hold(place / "lock")
    finally:
        shutil.rmtree(place)
