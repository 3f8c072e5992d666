"""Writing single files so that a reader sees the old content or the new one; copying and hashing them.

Folders are written whole in the same sense by `staged_folder`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from gora_serve.errors import MachineError, OutputError
from gora_serve.integrity.cache import Digests, QuickCache, now
from gora_serve.integrity.reading import open_regular, pieces
from gora_serve.integrity.staging import file_in_the_way, publish, staged_folder, sync_published
from gora_serve.signals import leave_if_asked

__all__ = [
    "copy_file", "json_text", "list_files", "make_parents", "refuse_existing", "sha256_file", "staged_folder",
    "write_bytes", "write_json", "write_stream", "write_text",
]  # fmt: skip


def copy_file(source: Path, target: Path) -> None:
    """Write `target` with the content of `source`, a regular file that stands still meanwhile."""
    with open_regular(source) as fd, write_stream(target) as stream:
        for piece in pieces(fd, 0, os.fstat(fd).st_size, path=source):
            stream.write(piece)


def sha256_file(path: Path, cache: QuickCache | None = None) -> tuple[int, str]:
    """Return the size in bytes and the hexadecimal SHA-256 of the file at `path`, or what `cache` knows of it."""
    digest, begun = hashlib.sha256(), now()
    with open_regular(path) as fd:
        status = os.fstat(fd)
        known = cache.take(status) if cache else None
        if known is not None:
            return status.st_size, known
        for piece in pieces(fd, 0, status.st_size, path=path):
            digest.update(piece)
    if cache:
        cache.keep(status, Digests(digest.hexdigest()), begun=begun)
    return status.st_size, digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Return the relative POSIX paths of the files below `folder`, sorted; symlinks are not followed.

    A symlink to a folder counts as a file, so that nothing can hide behind it. Raises MachineError (GS-502).
    """
    found: list[str] = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in names + links]
    return sorted(found)


def _unreadable(err: OSError) -> NoReturn:
    what = f"this folder cannot be read: {err.strerror}"
    hint = "check its permissions"
    raise MachineError(what, code="GS-502", file=err.filename, hint=hint) from err


def refuse_existing(path: Path) -> None:
    """Raise OutputError if there is something at `path`: to be asked before work starts."""
    if os.path.lexists(path):
        hint = "choose another output, or pass --overwrite"
        raise OutputError("the output exists", code="GS-601", file=path, kept="nothing was changed", hint=hint)


def make_parents(path: Path) -> Path:
    """Make the folders that an output of a user's own lies in, and return the output.

    Raises MachineError (GS-505) where that cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        if (blocked := file_in_the_way(path, "nothing was changed")) is not None:
            raise blocked from err
        what, hint = f"its folder cannot be made: {err.strerror}", "choose another place, or check permissions"
        raise MachineError(what, code="GS-505", file=path, kept="nothing was changed", hint=hint) from err
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all, durably; the mode follows the umask.

    Raises MachineError (GS-505), and the old file is then as it was.
    """
    with write_stream(path) as stream:
        stream.write(data)


@contextmanager
def write_stream(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream whose content becomes `path`, as `write_bytes`, when the block ends without an exception.

    Without `overwrite` a file that is there by then is left, and OutputError (GS-601) raised.
    """
    temporary, held = path, -1
    try:
        _sweep_temporaries(path)
        temporary, fd = _open_temporary(path)
        with os.fdopen(fd, "wb") as stream:
            held = os.dup(fd)  # keeps the lock until the name is the file's own
            yield stream
            stream.flush()
            os.fsync(fd)
        leave_if_asked()
        if overwrite:
            temporary.replace(path)
        else:
            publish(temporary, path, overwrite=False)
    except OSError as err:
        what = f"this file cannot be written: {err.strerror}"
        hint = "check the folder's permissions, and the space that is left on the disk"
        raise MachineError(what, code="GS-505", file=path, kept="nothing was changed", hint=hint) from err
    finally:
        if temporary != path:
            with suppress(OSError):
                temporary.unlink()
        if held >= 0:
            os.close(held)
    sync_published(path)


def _open_temporary(path: Path) -> tuple[Path, int]:
    """Make a new file beside `path` and hold a lock on it, the mark of a writer that lives."""
    while True:
        temporary = path.with_name(f".{path.name[:50]}.gora-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # of a file system without locks; there nothing is swept either
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return temporary, fd
        os.close(fd)  # another writer swept it before it was locked


def _sweep_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` left beside it: temporary files that nobody holds."""
    pattern = re.compile(re.escape(f".{path.name[:50]}.gora-") + r"\d+-[0-9a-f]{8}\.tmp")
    for left in path.parent.iterdir():
        if not pattern.fullmatch(left.name):
            continue
        with suppress(OSError):
            fd = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, as `write_bytes`; line ends are written as they are."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: object) -> str:
    """Return `value` as JSON for people: 2 spaces, keys in their order, no NaN, a line end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: object, *, overwrite: bool = True) -> None:
    """Write `value` as JSON for people, as `write_stream`."""
    with write_stream(path, overwrite=overwrite) as stream:
        stream.write(json_text(value).encode("utf-8"))
