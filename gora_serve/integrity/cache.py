"""The user's cache folder: digests by a file's device, inode, size and times, for checks of level L0.

An entry is a hint and never a proof. One that is damaged, stale, or could have been written by somebody else is passed
over, and a cache that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.errors import GoraError
from gora_serve.integrity.canonical import canonical_json, parse_json
from gora_serve.integrity.levels import Level
from gora_serve.integrity.reading import identity, pieces

SCHEMA = "gora-serve/stat-cache/1"
ENTRY_LIMIT = 64 << 20  # bytes
MARGIN = 2_000_000_000  # ns: a file may change twice within one tick of its clock (2 s on FAT), unseen
_DIGEST = re.compile(r"[0-9a-f]{64}")
KEPT = 4096  # entries; the oldest go first


def cache_folder() -> Path:
    """Return GORA_SERVE_CACHE, else gora-serve in XDG_CACHE_HOME, else ~/.cache/gora-serve; it need not exist."""
    own, shared = os.environ.get("GORA_SERVE_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).absolute()
    return (Path(shared) if Path(shared).is_absolute() else Path("~/.cache").expanduser()) / "gora-serve"


def read_private(path: Path) -> bytes | None:
    """Return the content of a file that only we can have written, or None for any other."""
    try:
        if not _is_private(path.parent.lstat(), stat.S_ISDIR):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not _is_private(status, stat.S_ISREG) or status.st_size > ENTRY_LIMIT:
                return None
            return b"".join(bytes(piece) for piece in pieces(fd, 0, status.st_size, path=path))
        finally:
            os.close(fd)
    except (OSError, GoraError):
        return None


def _is_private(status: os.stat_result, kind: Any) -> bool:
    return bool(kind(status.st_mode)) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def write_private(path: Path, data: bytes, *, kept: int) -> bool:
    """Write a file that only we can read, whole; drop the oldest of its folder beyond `kept`. Return whether it went.

    Not synced: a torn entry is found by its reader.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path.parent.lstat(), stat.S_ISDIR):
            return False
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as stream:
            stream.write(data)
        temporary.replace(path)
        _drop_oldest(path.parent, kept)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _drop_oldest(folder: Path, kept: int) -> None:
    names = [entry.name for entry in os.scandir(folder)]
    if len(names) > kept + kept // 8:  # not at every write
        for path in sorted((folder / name for name in names), key=lambda path: path.lstat().st_mtime_ns)[:-kept]:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Digests:
    """What is known of one file: its SHA-256, and the digest of each tensor by name, where they were computed."""

    sha256: str | None = None
    tensors: Mapping[str, str] | None = None


class QuickCache:
    """Digests of files that stand as they stood when they were hashed. `level` says whether any was taken from here."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder()) / "stat"
        self.reused = 0

    @property
    def level(self) -> Level:
        """Return what a check was that used this cache: L0 as soon as one digest came from here."""
        return Level.STAT if self.reused else Level.BYTES

    def find(self, status: os.stat_result) -> Digests:
        """Return what is known of the file with this status; nothing where no entry can be trusted."""
        raw = read_private(self._path(status))
        with suppress(GoraError, ValueError, KeyError, TypeError, AttributeError):
            if raw is not None:
                return _read_entry(raw, status, self._path(status))
        return Digests()

    def take(self, status: os.stat_result) -> str | None:
        """Return the SHA-256 of the file with this status, counted as reused, or None."""
        found = self.find(status).sha256
        self.reused += found is not None
        return found

    def keep(self, status: os.stat_result, digests: Digests, *, begun: int) -> None:
        """Remember the digests of a file that had this status before and after it was hashed.

        begun: `time.time_ns()` before the first byte was read.
        """
        if max(status.st_mtime_ns, status.st_ctime_ns) + MARGIN >= begun:
            return
        known = self.find(status)
        value = {
            "schema": SCHEMA,
            "identity": _identity(status),
            "begun": str(begun),
            "sha256": digests.sha256 or known.sha256,
            "tensors": dict(digests.tensors or known.tensors or {}) or None,
        }
        checked = canonical_json({**value, "check": _check(value)})
        write_private(self._path(status), checked, kept=KEPT)

    def _path(self, status: os.stat_result) -> Path:
        return self.folder / f"{hashlib.sha256(repr(_identity(status)).encode()).hexdigest()[:32]}.json"


def now() -> int:
    """Return the time for `begun` of `keep`."""
    return time.time_ns()


def _identity(status: os.stat_result) -> list[str]:
    return [str(number) for number in identity(status)]  # text: they are beyond what JSON's numbers carry


def _check(value: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _read_entry(raw: bytes, status: os.stat_result, path: Path) -> Digests:
    value = parse_json(raw, path)
    if not isinstance(value, dict) or value.pop("check", None) != _check(value) or value["schema"] != SCHEMA:
        return Digests()
    if value["identity"] != _identity(status):
        return Digests()
    if max(status.st_mtime_ns, status.st_ctime_ns) + MARGIN >= int(value["begun"]):
        return Digests()
    digests = Digests(value["sha256"], value["tensors"])
    if not all(_DIGEST.fullmatch(text) for text in (digests.sha256 or "0" * 64, *(digests.tensors or {}).values())):
        return Digests()
    return digests
