"""`verify --against hub`: every local file against the digest that the hub reports for its commit. No downloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gora_serve.errors import MachineError, UsageError
from gora_serve.integrity.files import list_files
from gora_serve.integrity.hub import HubFile, HubId, list_commit, parse_id
from gora_serve.integrity.snapshots import MODEL, digest_file, matches, snapshot_folder, snapshot_id
from gora_serve.progress import Listener, Progress, silent

State = Literal["equal", "differs", "missing", "extra", "not here"]

NEEDED = (*MODEL, "adapter_model.*")  # other files of a repository need not be here: pictures, weights in other formats
OURS = (".git/*", ".cache/huggingface/*")  # what the hub's and git's downloads add, and no repository holds


@dataclass(frozen=True)
class Compared:
    """One file: `expected` is the hub's digest, `actual` ours, each None where that side has no such file."""

    path: str
    state: State
    algorithm: str
    expected: str | None
    actual: str | None


@dataclass(frozen=True)
class AgainstHub:
    """What came of the comparison of a folder with a commit."""

    path: Path
    repo: str
    commit: str
    files: tuple[Compared, ...]

    @property
    def faults(self) -> tuple[Compared, ...]:
        return tuple(file for file in self.files if file.state not in ("equal", "not here"))

    def to_json(self) -> dict[str, Any]:
        """Return what `verify --against hub --json` prints."""
        return {
            "path": str(self.path),
            "repo": self.repo,
            "commit": self.commit,
            "verified": not self.faults,
            "level": "L2 full bytes",
            "files": [vars(file) for file in self.files],
        }


def verify_against_hub(name: str, repo: str | None = None, *, listen: Listener = silent) -> AgainstHub:
    """Compare a folder, or the cached snapshot of a hub id, with what the hub says of the commit.

    repo: the id that a folder is a copy of; one of the hub's cache says so itself. Raises MachineError (GS-551) when
    the hub cannot be asked, (GS-552) when the commit is not here.
    """
    folder, which = _folder_and_id(name, repo)
    commit, promised = list_commit(which)
    folder = folder or snapshot_folder(which.repo, commit)
    if not folder.is_dir():
        raise MachineError(
            "this commit is not on this machine, so there is nothing to compare", code="GS-552", file=str(which),
            actual=f"commit {commit}", hint="a command that takes it as BASE or ADAPTER downloads it, and checks it",
        )  # fmt: skip
    return AgainstHub(folder, which.repo, commit, compare(folder, promised, listen=listen))


def _folder_and_id(name: str, repo: str | None) -> tuple[Path | None, HubId]:
    folder = Path(name)
    if not folder.exists():
        if repo is not None:
            raise MachineError("there is no such folder", code="GS-503", hint="check the path", file=folder)
        return None, parse_id(name)
    which = parse_id(repo) if repo is not None else snapshot_id(folder)
    if which is None:
        raise UsageError(
            "nothing says which repository this folder is a copy of", code="GS-262", file=folder,
            hint="add --repo org/name@REVISION",
        )  # fmt: skip
    return folder, which


def compare(folder: Path, promised: Mapping[str, HubFile], *, listen: Listener = silent) -> tuple[Compared, ...]:
    """Return how each file of `folder`, and each that the hub promised, fares; those with faults first."""
    local = [name for name in list_files(folder) if not matches(name, OURS)]
    compared = []
    for number, name in enumerate(local):
        compared.append(_compared(folder, name, promised.get(name)))
        listen(Progress("compare", number + 1, len(local)))
    for name in promised.keys() - set(local):
        state: State = "missing" if matches(name, NEEDED) else "not here"
        compared.append(Compared(name, state, promised[name].algorithm, promised[name].digest, None))
    order = ("differs", "missing", "extra", "equal", "not here")
    return tuple(sorted(compared, key=lambda file: (order.index(file.state), file.path)))


def _compared(folder: Path, name: str, promised: HubFile | None) -> Compared:
    if promised is None:
        return Compared(name, "extra", "sha256", None, digest_file(folder / name, "sha256"))
    actual = digest_file(folder / name, promised.algorithm)
    state: State = "equal" if actual == promised.digest else "differs"
    return Compared(name, state, promised.algorithm, promised.digest, actual)
