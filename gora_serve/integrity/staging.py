"""Writing a folder whole or not at all: a stage beside the target, a lock, one atomic rename.

Whatever happens to the process, the target is the old folder, the new one, or absent; the next run sweeps leftovers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gora_serve.errors import MachineError, OutputError, UsageError, listed
from gora_serve.integrity.locks import is_locked, locked
from gora_serve.integrity.publishing import (
    beside,
    delete_old,
    fsync_path,
    fsync_tree,
    probe_folder,
    publish,
    remove_folder,
    sync_published,
)
from gora_serve.integrity.reading import unreadable
from gora_serve.integrity.targets import SEAL, UNCHANGED, check_target
from gora_serve.signals import leave_if_asked

__all__ = [
    "SEAL", "UNCHANGED", "check_partial", "check_target", "fsync_path", "is_held", "partial_of", "probe_folder",
    "publish", "staged_folder", "sync_published",
]  # fmt: skip

_LEFTOVER = re.compile(r"\.(.+\.)?gora-\d+-[0-9a-f]{8}\.(tmp|old)|\..+\.lock")  # of a killed process


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
    with _held(target):
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
                leave_if_asked()
                if visible:
                    _sweep(stage)
                fsync_tree(stage)
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
                delete_old(old, target)
            raise
        if old is not None:
            delete_old(old, target)


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
        if (blocked := file_in_the_way(target, kept)) is not None:
            raise blocked from err
        if stage is None and isinstance(where, str | bytes | os.PathLike):
            ours = Path(os.fsdecode(where)).name.startswith(f".{target.name}.")  # the lock, or a stage
            where = target if ours else where
        what = f"the output cannot be written: {err.strerror or err}"
        hint = "check the folder's permissions, and the space that is left on the disk"
        raise MachineError(what, code="GS-505", file=where, kept=kept, hint=hint) from err


def file_in_the_way(target: Path, kept: str) -> MachineError | None:
    """Return the error (GS-505) for an output below something that is no folder; None where nothing is in the way."""
    found = next((place for place in target.absolute().parents if os.path.lexists(place) and not place.is_dir()), None)
    if found is None:
        return None
    return MachineError(
        "the output cannot be written: a part of its path is no folder", code="GS-505", file=target, actual=str(found),
        kept=kept, hint="choose an output below a folder",
    )  # fmt: skip


def _is_of_output(path: Path, stage: Path, target: Path) -> bool:
    """Return whether a file is in the stage, is the target or its folder, or lies beside it under a name of ours."""
    if stage in (path, *path.parents) or path in (target, target.parent):
        return True
    return path.parent == target.parent and path.name.startswith(f".{target.name}.")


@contextmanager
def _held(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; an error of the system that keeps from it is one of the output."""
    with ExitStack() as stack:
        with _os_errors(target, UNCHANGED):
            stack.enter_context(locked(target))
        yield


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
    stage = beside(target, "tmp")
    stage.mkdir()
    return stage


def partial_of(target: Path) -> Path:
    """Return the name of the visible stage of `target`."""
    return target.with_name(f"{target.name}.partial")


def is_held(partial: Path) -> bool:
    """Return whether a process writes the output whose visible stage this is, as far as can be told."""
    stage = partial.resolve()
    return is_locked(stage.with_name(stage.name.removesuffix(".partial")))


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
            actual=listed(names), kept=UNCHANGED, hint="move it away, or choose another output",
        )  # fmt: skip


def _open_partial(target: Path, *, overwrite: bool, resume: bool, mark: str | None) -> Path:
    stage = check_partial(target, overwrite=overwrite, resume=resume, mark=mark)
    if stage.exists() and resume:
        _sweep(stage)
        return stage
    if stage.exists():
        remove_folder(stage, target)
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
