"""Downloads from the hub at one commit, into its library's cache, and the check that they are what the hub promised.

A file is hashed once after it was downloaded, and again when its size, times or inode changed; the note of that is in
the user's cache and no proof: whoever needs one hashes the files.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import GoraError, MachineError, MismatchError, counted, listed
from gora_serve.integrity.cache import cache_folder
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.files import list_files, sha256_file, write_json
from gora_serve.integrity.hub import Algorithm, HubId, asking
from gora_serve.integrity.layout import blob_name, confined
from gora_serve.integrity.reading import identity, open_regular, pieces, size_of

log = logging.getLogger(__name__)

SETTINGS = ("*.json",)
MODEL = (*SETTINGS, "*.safetensors", "*.model", "*.txt", "*.jinja")
ADAPTER = (*SETTINGS, "*.safetensors", "README.md", "*.bin", "*.pt", "*.ckpt")
NOTE = "gora-serve/hub-check/1"
AGAIN = "delete this file and run the same command again: it alone is downloaded anew"


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository, as it lies in the cache."""

    repo: str
    commit: str
    path: Path


def download(which: HubId, wanted: Sequence[str]) -> Snapshot:
    """Download the files that match `wanted` at one commit, or find them in the cache, and check each of them.

    What is complete is kept when the connection breaks, and not downloaded again. Raises MachineError (GS-521) when the
    hub cannot give them, MismatchError (GS-105, GS-123) when they are not what it promised.
    """
    hint = "check the spelling, the network and HF_TOKEN; or give a local folder"
    with asking("no such directory, and the hub could not give it", code="GS-521", file=which, hint=hint):
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(which.repo, revision=which.revision, allow_patterns=list(wanted)))
        path.mkdir(parents=True, exist_ok=True)  # a commit that holds no such file
    snapshot = Snapshot(which.repo, path.name, path)
    check_snapshot(snapshot, wanted)
    return snapshot


def snapshot_folder(repo: str, commit: str) -> Path:
    """Return where the cache keeps a commit of a repository, whether it does or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def snapshot_id(path: Path) -> HubId | None:
    """Return the repository and commit that a folder of the hub's cache says it is, by its path."""
    real = path.resolve()
    repo = real.parent.parent.name
    if real.parent.name != "snapshots" or not repo.startswith("models--"):
        return None
    return HubId(repo.removeprefix("models--").replace("--", "/"), real.name)


def check_snapshot(snapshot: Snapshot, wanted: Sequence[str]) -> None:
    """Compare a snapshot with what the hub's library noted of it: names, sizes, digests.

    Raises MismatchError: GS-123 where files are missing or nobody's, GS-105 where some are damaged.
    """
    tree = _known_tree(snapshot)
    present = set(list_files(snapshot.path))
    if tree is not None:
        missing = sorted(name for name in tree if matches(name, wanted) and name not in present)
        _refuse_names(snapshot, missing, "missing", "run the same command again, with a network")
        _refuse_names(snapshot, sorted(present - tree.keys()), "not the hub's", "delete them: nobody published them")
    note = _note_file(snapshot)
    noted = _read_note(note)
    found = {name: _identity(confined(snapshot.path, name)) for name in sorted(present)}
    fresh = [name for name in found if noted.get(name) != found[name]]
    if fresh:
        _check_files(snapshot, fresh, tree or {})
        _write_note(note, found)


def _known_tree(snapshot: Snapshot) -> Mapping[str, tuple[int, str]] | None:
    """What the hub's library noted of the commit's files when it downloaded: size and git's digest, or None."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(snapshot.repo, revision=snapshot.commit)
    except CachedRepoTreeNotFoundError:
        return None
    return {item.path: (item.size, item.blob_id) for item in files}


def _refuse_names(snapshot: Snapshot, names: Sequence[str], fault: str, hint: str) -> None:
    if names:
        raise MismatchError(
            f"{counted(len(names), 'file')} of the downloaded snapshot: {fault}: {listed(names)}", code="GS-123",
            file=snapshot.path / names[0], hint=hint,
        )  # fmt: skip


def _check_files(snapshot: Snapshot, names: Iterable[str], tree: Mapping[str, tuple[int, str]]) -> None:
    damaged = []
    for name in names:
        path = confined(snapshot.path, name)
        size, blob = tree.get(name, (None, None))
        faults = _damage(path, blob_name(snapshot.path, name), size, blob)
        damaged += [(name, path, *faults)] if faults else []
    if damaged:
        _, path, expected, actual = damaged[0]
        count = "a file" if len(damaged) == 1 else f"{len(damaged)} files"
        what = f"{count} of the hub cache: not what the hub promised: {listed(one[0] for one in damaged)}"
        raise MismatchError(what, code="GS-105", file=path, expected=expected, actual=actual, hint=AGAIN)


def _damage(path: Path, promised: str | None, size: int | None, blob: str | None) -> tuple[str, str] | None:
    """Return what was promised and what is there, or None where they agree.

    promised: the blob's name. size, blob: from the listing; where files are copies, not links, it alone promises.
    """
    actual_size, sha256 = sha256_file(path)
    if size is not None and actual_size != size:
        return f"{size} bytes", f"{actual_size} bytes"
    if promised is not None and len(promised) == len(sha256):
        return None if promised == sha256 else (promised, sha256)
    promised = promised or blob
    if promised is None:
        return None
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {actual_size}\n".encode()
    actual = digest_file(path, "git-sha1")
    in_lfs = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()  # how git knows a file that is in LFS
    return None if promised in (actual, in_lfs) else (promised, actual)


def digest_file(path: Path, algorithm: Algorithm) -> str:
    """Return the digest of the file at `path` as the hub gives it: SHA-256, or the SHA-1 of git's blob."""
    if algorithm == "sha256":
        return sha256_file(path)[1]
    with open_regular(path) as fd:
        digest = hashlib.sha1(b"blob %d\0" % size_of(fd))
        for piece in pieces(fd, 0, size_of(fd), path=path):
            digest.update(piece)
    return digest.hexdigest()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether the hub's library would take `name` for one of `patterns`: `*` stands for slashes too."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _identity(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as err:
        raise MachineError(
            f"this file cannot be read: {err.strerror}",
            code="GS-502",
            hint="check the permissions of the cache",
            file=path,
        ) from err
    return list(identity(status))


def _note_file(snapshot: Snapshot) -> Path:
    key = hashlib.sha256(os.fsencode(snapshot.path.resolve())).hexdigest()[:16]
    return cache_folder() / "hub" / f"{snapshot.repo.replace('/', '--')}-{snapshot.commit}-{key}.json"


def _read_note(path: Path) -> Mapping[str, object]:
    try:
        value = read_json(path)
    except GoraError:  # none yet, or not ours: hash again
        return {}
    files = value.get("files") if isinstance(value, dict) and value.get("schema") == NOTE else None
    return files if isinstance(files, dict) else {}


def _write_note(path: Path, files: Mapping[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": NOTE, "files": dict(files)})
    except (OSError, MachineError) as err:
        log.debug("%s cannot be written, so the files are hashed again next time: %s", path, err)
