"""The verified store: read-only copies of what was verified, in folders named after their content.

The engine reads adapters from here, so nothing can change between check and use, and another version of an adapter is
another path: vLLM's cache of prefixes is keyed by it. A copy, never a link: whoever owns the original may write to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import GoraError, MachineError, OutputError
from gora_serve.integrity.cache import cache_folder
from gora_serve.integrity.canonical import canonical_json
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.headers import read_header
from gora_serve.integrity.manifest import hash_adapter
from gora_serve.integrity.reading import changed_while_reading, open_regular, pieces, size_of
from gora_serve.integrity.space import require_space
from gora_serve.integrity.staging import staged_folder
from gora_serve.serving.adapter_dir import CONFIG_FILE, WEIGHTS_FILE

KEPT = 7 * 24 * 3600.0  # seconds that an entry stays after its last use
PATIENCE = 60.0  # seconds to wait for another process that copies the same adapter
_KEY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}")
_ASIDE = re.compile(r"\.trash-[0-9a-f]{16}")
_STAGE = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{16}\.gora-\d+-[0-9a-f]{8}\.tmp")
LONGEST_COPY = 24 * 3600.0  # seconds: a stage that was not touched for so long is a dead process's


@dataclass(frozen=True)
class Content:
    """What an adapter is: the root of its tensors, and the SHA-256 of the rest: its configuration, where the scales
    are, and what its weights file says of itself, where the base is that it is bound to."""

    root: str
    rest: str

    @property
    def key(self) -> str:
        """The name of the entry: 64 hexadecimal digits of the root, 16 of the rest."""
        return f"{self.root.rpartition(':')[2]}-{self.rest[:16]}"


def content_of(folder: Path) -> Content:
    """Hash both files of an adapter folder."""
    return Content(hash_adapter(folder / WEIGHTS_FILE)[0], rest_of(folder))


def rest_of(folder: Path) -> str:
    """Return the SHA-256 of what the files of an adapter folder say beside its tensors."""
    said = {"config": sha256_file(folder / CONFIG_FILE)[1], "metadata": read_header(folder / WEIGHTS_FILE).metadata}
    return hashlib.sha256(canonical_json(said)).hexdigest()


class Store:
    """A folder of entries. `folder` defaults to "adapters" in the user's cache."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder() / "adapters").absolute()

    def place(self, content: Content) -> Path:
        """Return where an adapter lies, or would lie."""
        return self.folder / content.key

    def put(self, folder: Path, content: Content) -> Path:
        """Copy an adapter that has this content into the store, and return its entry.

        An entry that is there is hashed again; a damaged one is replaced. Raises MismatchError (GS-101) where the
        folder has other content by now, MachineError (GS-560 too little space, GS-5351 others can write to the store,
        GS-505 it cannot be written): nothing is left then.
        """
        self._open()
        entry, deadline = self.place(content), time.monotonic() + PATIENCE
        while True:
            if _holds(entry, content):
                os.utime(entry)
                return entry
            try:
                self._remove(entry)
                self._copy(folder, entry, content)
            except OutputError:  # another process copies the same adapter, or has just done so
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def sweep(self, kept: float = KEPT) -> list[str]:
        """Remove the entries that no server holds and that were last used more than `kept` seconds ago; return them.

        Also what killed processes left.
        """
        if not self.folder.is_dir():
            return []
        swept = []
        for path in sorted(self.folder.iterdir()):
            with suppress(FileNotFoundError):  # another server sweeps too
                unused = time.time() - path.lstat().st_mtime
                if _ASIDE.fullmatch(path.name) or (_STAGE.fullmatch(path.name) and unused > LONGEST_COPY):
                    _delete(path)
                elif _KEY.fullmatch(path.name) and unused > kept and self._remove(path):
                    swept.append(path.name)
        return swept

    def _open(self) -> None:
        """Make the folder; MachineError (GS-5351) if anybody else can write to it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
        except OSError as err:
            raise MachineError(
                f"the store cannot be made: {err.strerror}", code="GS-5351", file=self.folder,
                hint="name another folder with --store, or set GORA_SERVE_CACHE",
            ) from err  # fmt: skip
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise MachineError(
                "others can write to the store, so what is in it proves nothing", code="GS-5351", file=self.folder,
                expected="a folder of your own, mode 700", actual=f"mode {stat.S_IMODE(status.st_mode):o}",
                hint="chmod 700, or name another folder with --store",
            )  # fmt: skip

    def _copy(self, folder: Path, entry: Path, content: Content) -> None:
        files = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
        require_space(entry, sum(path.stat().st_size for path in files))
        with staged_folder(entry) as stage:
            for path in files:
                _copy_file(path, stage / path.name)
            if content_of(stage) != content:
                raise changed_while_reading(folder / WEIGHTS_FILE)
        entry.chmod(0o500)

    def _remove(self, entry: Path) -> bool:
        """Remove an entry unless a server holds it: renamed first, so that half of one is never taken for a whole."""
        try:
            fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside = self.folder / f".trash-{secrets.token_hex(8)}"
            entry.rename(aside)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        _delete(aside)
        return True


@contextmanager
def held(entries: Iterable[Path]) -> Iterator[None]:
    """Keep the entries from being swept while the block runs."""
    with ExitStack() as stack:
        for entry in entries:
            stack.callback(os.close, hold(entry))
        yield


def hold(entry: Path) -> int:
    """Lock an entry against being swept; return the descriptor to close when it is no longer served."""
    fd = -1
    try:
        fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), entry.stat()):
            return fd
    except OSError:
        pass
    if fd >= 0:
        os.close(fd)
    raise MachineError(
        "an adapter has gone from the store", code="GS-5352", file=entry, hint="serve again: it is copied anew"
    )


def _holds(entry: Path, content: Content) -> bool:
    """Return whether the entry is whole, and has this content: every byte of it is hashed."""
    try:
        status = entry.lstat()
        if not stat.S_ISDIR(status.st_mode) or {path.name for path in entry.iterdir()} != {CONFIG_FILE, WEIGHTS_FILE}:
            return False
        return content_of(entry) == content
    except (OSError, GoraError):
        return False


def _copy_file(source: Path, target: Path) -> None:
    with open_regular(source) as fd, target.open("xb") as stream:
        for piece in pieces(fd, 0, size_of(fd), path=source):
            stream.write(piece)
        os.fchmod(stream.fileno(), 0o400)


def _delete(folder: Path) -> None:
    with suppress(OSError):
        folder.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
