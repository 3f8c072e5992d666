"""Writing a folder whole or not at all: a stage beside the target, a lock, one atomic rename.

Whatever happens to the process, the target is the old folder, the new one, or absent; the next run sweeps leftovers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gora_serve.errors import MachineError, OutputError, UsageError
from gora_serve.integrity.reading import unreadable

log = logging.getLogger(__name__)

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
UNCHANGED = "nothing was changed"
_LEFTOVER = re.compile(r"\.(.+\.)?gora-\d+-[0-9a-f]{8}\.(tmp|old)|\..+\.lock")  # of a killed process
SEAL = "gora_manifest.json"  # what a finished output folder of ours holds
REPLACEABLE = (SEAL, "run.json", "adapter_config.json")  # one of these is in a folder that --overwrite may replace


@contextmanager
def staged_folder(
    target: Path,
    *,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
    visible: bool = False,
    resume: bool = False,
    mark: str | None = None,
) -> Iterator[Path]:
    """Yield a new folder beside `target` to write into; on leaving without an exception it becomes `target`.

    With `visible` the folder is `<target>.partial` and survives a failure; with `resume` too, one that is there already
    is taken as it is, without the temporary files of a dead process. `mark` names the file that is written first: a
    partial folder that holds files but not this one is not ours. `protect` lists inputs that the target must not be,
    contain or lie in. Raises UsageError (GS-251 to GS-257), OutputError (GS-601 exists, GS-602 locked, GS-603 a partial
    folder exists, GS-604 it is not ours), MachineError (GS-505 nothing was changed, GS-506 published but not surely on
    disk); an OSError of the body becomes GS-505 too.
    """
    target = target.absolute()
    with _os_errors(target, UNCHANGED):
        check_target(target, overwrite=overwrite, protect=protect, resume=resume)
    with _os_errors(target, UNCHANGED):
        target.parent.mkdir(parents=True, exist_ok=True)
        target = target.parent.resolve() / target.name
    with _locked(target):
        with _os_errors(target, UNCHANGED):
            _recover(target)
            check_target(target, overwrite=overwrite, protect=protect, resume=resume)
            stage = (
                _open_partial(target, overwrite=overwrite, resume=resume, mark=mark) if visible else _new_stage(target)
            )
        kept = f"the unfinished output is in {stage}; --resume goes on with it" if visible else UNCHANGED
        try:
            with _os_errors(target, kept, stage):
                yield stage
                if visible:
                    _sweep(stage)
                _fsync_tree(stage)
                old = publish(stage, target, overwrite=overwrite)
        except BaseException as err:
            if not visible:
                shutil.rmtree(stage, ignore_errors=True)
            elif isinstance(err, MachineError) and err.fields.get("kept") == UNCHANGED:  # said of one file
                raise err.keeping(kept) from err
            raise
        try:
            sync_published(target)
        except (KeyboardInterrupt, SystemExit):
            if old is not None:
                _delete_old(old, target)
            raise
        if old is not None:
            _delete_old(old, target)


def check_target(target: Path, *, overwrite: bool = False, protect: Sequence[Path] = (), resume: bool = False) -> None:
    """Raise UsageError or OutputError if `staged_folder` would refuse `target` before work starts; changes nothing."""
    if target.name in ("", ".."):
        raise UsageError("the output needs a name of its own", code="GS-255", file=target, hint="name a folder")
    if target.is_symlink():
        raise UsageError(
            "the output is a symlink", code="GS-252", file=target, hint="name the folder that it points to"
        )
    for path in protect:
        relation = _relation(target, path)
        if relation:
            hint = "choose an output folder outside the inputs"
            what = f"the output {relation} an input, {path}"
            raise UsageError(what, code="GS-251", file=target, kept=UNCHANGED, hint=hint)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError("the output is not a folder", code="GS-253", file=target, kept=UNCHANGED)
    if not overwrite:
        hint = "choose another output, or pass --overwrite"
        if resume:
            hint = "it is complete, there is nothing to resume; to start anew: --overwrite without --resume"
        raise OutputError("the output exists", code="GS-601", file=target, kept=UNCHANGED, hint=hint)
    if (target / "config.json").exists() and not (target / SEAL).exists():
        hint = "choose another output; a model folder is not overwritten"
        raise UsageError("the output is a model folder", code="GS-256", file=target, kept=UNCHANGED, hint=hint)
    for place in (Path.cwd(), Path.home()):
        if _relation(target, place) in ("is", "contains"):
            what = f"the output to be replaced is or contains {place}"
            raise UsageError(what, code="GS-254", file=target, kept=UNCHANGED)
    if any(target.iterdir()) and not any((target / mark).exists() for mark in REPLACEABLE):
        hint = "choose another output; --overwrite replaces runs and adapters, and nothing else"
        raise UsageError(
            "the folder to be replaced holds other things", code="GS-257", file=target, kept=UNCHANGED, hint=hint
        )


def _relation(target: Path, other: Path) -> str | None:
    """Return "is", "contains" or "lies in" as `target` does so with `other`, by path and by (device, inode)."""
    real, real_other = Path(os.path.realpath(target)), Path(os.path.realpath(other))
    ids, ids_other = _identities(real), _identities(real_other)
    if real == real_other or (ids[0] is not None and ids[0] == ids_other[0]):
        return "is"
    if real in real_other.parents or (ids[0] is not None and ids[0] in ids_other):
        return "contains"
    if real_other in real.parents or (ids_other[0] is not None and ids_other[0] in ids):
        return "lies in"
    return None


def _identities(real: Path) -> list[tuple[int, int] | None]:
    """Return (device, inode) of the path and of each of its parents, None where there is nothing."""
    result: list[tuple[int, int] | None] = []
    for path in (real, *real.parents):
        try:
            status = path.stat()
            result.append((status.st_dev, status.st_ino))
        except OSError:
            result.append(None)
    return result


@contextmanager
def _os_errors(target: Path, kept: str, stage: Path | None = None) -> Iterator[None]:
    """Turn an OSError into GS-505; while a stage is written, into GS-502 where it names a file that is not of ours."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our messages is gone; that is not about the output
    except OSError as err:
        where = err.filename2 or err.filename or target
        if stage is not None and isinstance(where, str | bytes | os.PathLike):
            path = Path(os.fsdecode(where)).absolute()
            if not _is_of_output(path, stage, target):
                raise unreadable(path, err).keeping(kept) from err
        what = f"the output cannot be written: {err.strerror or err}"
        hint = "check the folder's permissions, and the space that is left on the disk"
        raise MachineError(what, code="GS-505", file=where, kept=kept, hint=hint) from err


def _is_of_output(path: Path, stage: Path, target: Path) -> bool:
    """Return whether a file is in the stage, is the target or its folder, or lies beside it under a name of ours."""
    if stage in (path, *path.parents) or path in (target, target.parent):
        return True
    return path.parent == target.parent and path.name.startswith(f".{target.name}.")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` for as long as the block runs; it is a file beside the target, removed at the end."""
    path = target.with_name(f".{target.name}.lock")
    with _os_errors(target, UNCHANGED):
        fd = _lock(path, target)
    try:
        yield
    finally:
        _unlock(path, fd)


def _unlock(path: Path, fd: int) -> None:
    """Remove the lock while it is still held: who opened it before sees another inode and tries again."""
    try:
        path.unlink(missing_ok=True)
    except OSError as err:  # the work is done or has its own error; a lock that nobody holds stops nobody
        log.warning("%s cannot be removed (%s); it holds nothing up, delete it", path, err.strerror)
    finally:
        os.close(fd)


def _lock(path: Path, target: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
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


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.gora-{os.getpid()}-{secrets.token_hex(4)}.{ending}")


def _recover(target: Path) -> None:
    """Undo or finish what a dead process left, while we hold the lock: restore a set-aside folder, sweep stages."""
    pattern = re.compile(re.escape(f".{target.name}.gora-") + r"\d+-[0-9a-f]{8}\.(tmp|old)")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and match[1] == "old" and not os.path.lexists(target):
            path.rename(target)
        elif match:
            shutil.rmtree(path, ignore_errors=True)


def _new_stage(target: Path) -> Path:
    stage = _beside(target, "tmp")
    stage.mkdir()
    return stage


def partial_of(target: Path) -> Path:
    """Return the name of the visible stage of `target`."""
    return target.with_name(f"{target.name}.partial")


def check_partial(target: Path, *, overwrite: bool, resume: bool = False, mark: str | None = None) -> Path:
    """Return the partial folder of `target`; raise as `staged_folder` would if it is in the way. Changes nothing."""
    stage = partial_of(target)
    if stage.is_symlink():
        raise UsageError("the partial output is a symlink", code="GS-252", file=stage, hint="name a folder")
    if stage.exists() and not stage.is_dir():
        raise UsageError("the partial output is not a folder", code="GS-253", file=stage, kept=UNCHANGED)
    _check_ours(stage, mark)
    if stage.exists() and not overwrite and not resume:
        hint = "go on with it by --resume, or start anew with --overwrite"
        raise OutputError("an unfinished output exists", code="GS-603", file=stage, kept=UNCHANGED, hint=hint)
    return stage


def _check_ours(stage: Path, mark: str | None) -> None:
    """Raise OutputError (GS-604) if the folder holds anything but leftovers of a dead process, and no `mark`."""
    if mark is None or not stage.is_dir() or (stage / mark).is_file():
        return
    names = sorted(path.name for path in stage.iterdir() if not _LEFTOVER.fullmatch(path.name))
    if names:
        raise OutputError(
            f"this folder is no unfinished run of ours: it holds files, but no {mark}", code="GS-604", file=stage,
            actual=", ".join(names[:5]), kept=UNCHANGED, hint="move it away, or choose another output",
        )  # fmt: skip


def _open_partial(target: Path, *, overwrite: bool, resume: bool, mark: str | None) -> Path:
    stage = check_partial(target, overwrite=overwrite, resume=resume, mark=mark)
    if stage.exists() and resume:
        _sweep(stage)
        return stage
    if stage.exists():
        _remove(stage, target)
    stage.mkdir()
    return stage


def _sweep(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing below `folder`: stages, temporary files, locks."""
    for place, folders, names in os.walk(folder):
        for name in filter(_LEFTOVER.fullmatch, names):
            Path(place, name).unlink()
        for name in [name for name in folders if _LEFTOVER.fullmatch(name)]:
            shutil.rmtree(Path(place, name))
            folders.remove(name)


def fsync_path(path: Path) -> None:
    """Wait until the file or folder at `path` is on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(folder: Path) -> None:
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
        if _renameat2(stage, target, _EXCHANGE if exists else _NOREPLACE):
            return stage if exists else None
    except FileExistsError as err:
        raise _appeared(target) from err
    if not exists:
        stage.rename(target)
        return None
    old = _beside(target, "old")
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


def _renameat2(source: Path, target: Path, flags: int) -> bool:
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


def _remove(folder: Path, target: Path) -> None:
    """Delete a folder beside `target`, under a name that the next run sweeps: half of it is never taken for a whole."""
    aside = _beside(target, "tmp")
    folder.rename(aside)
    try:
        shutil.rmtree(aside)
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _delete_old(old: Path, target: Path) -> None:
    try:
        _remove(old, target)
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
        return _renameat2(place / "a", place / "b", _EXCHANGE), _locks(place / "lock")
    finally:
        shutil.rmtree(place)


def _locks(path: Path) -> bool:
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
