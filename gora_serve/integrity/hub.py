"""Asking the Hugging Face hub: ids pinned to a commit, what it says of a commit's files, and errors without tokens.

huggingface_hub does the talking, and is imported only where it is needed. What is done with the answers (downloading,
comparing, pushing) lives in the modules beside this one.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gora_serve.errors import GoraError, MachineError, UsageError

Algorithm = Literal["sha256", "git-sha1"]

_REPO = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]{0,254}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGESTS = {"sha256": re.compile(r"[0-9a-f]{64}"), "git-sha1": _COMMIT}
# What a token looks like wherever it turns up: the hub's own, a header's, a web token.
_TOKENS = re.compile(r"hf_(?:[a-z]+_)?[A-Za-z0-9]{16,}|(?<=Bearer )[^\s'\",]+|eyJ[\w-]+\.[\w-]+\.[\w-]+")
HIDDEN = "<token>"


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, and a branch, tag or commit of it; None: its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class HubFile:
    """What the hub says of a file: `digest` is the SHA-256 of one in LFS (or Xet), git's SHA-1 of a small one."""

    size: int
    algorithm: Algorithm
    digest: str


def is_hub_id(text: str) -> bool:
    """Tell whether `text` may be a hub id, with or without a revision. Nobody is asked."""
    repo, at, revision = text.partition("@")
    parts = [*repo.split("/"), *(revision.split("/") if at else ())]
    if any(part.startswith(".") or part.endswith((".", ".git", ".lock")) or ".." in part for part in parts):
        return False
    is_repo = _REPO.fullmatch(repo) is not None and len(repo) <= 96 and "--" not in repo
    return is_repo and (not at or (all(parts) and _REVISION.fullmatch(revision) is not None))


def parse_id(text: str) -> HubId:
    """Return the hub id in `org/name` or `org/name@REVISION`. Raises UsageError (GS-261) for anything else."""
    if not is_hub_id(text):
        raise UsageError(
            "this is neither a folder nor a hub id", code="GS-261", expected="org/name or org/name@REVISION",
            actual=text, hint="REVISION is a branch, a tag or a commit, such as main",
        )  # fmt: skip
    repo, _, revision = text.partition("@")
    return HubId(repo, revision or None)


def is_commit(revision: str | None) -> bool:
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def list_commit(which: HubId) -> tuple[str, dict[str, HubFile]]:
    """Ask the hub which commit a revision is, and for the size and digest of each of its files; nothing is downloaded.

    Raises MachineError (GS-551) when the hub cannot be reached or knows no such repository or revision.
    """
    hint = "check the network, and HF_ENDPOINT where it is set"
    with asking("the hub could not be asked", code="GS-551", file=which, hint=hint):
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        commit = which.revision if is_commit(which.revision) else None
        commit = commit or api.model_info(which.repo, revision=which.revision).sha
        tree = api.list_repo_tree(which.repo, revision=commit, recursive=True)
        files = {item.path: _hub_file(item) for item in tree if isinstance(item, RepoFile)}
        if not is_commit(commit) or not all(map(_is_sound, files.items())):
            raise ValueError("its answer names no commit, or files outside of the repository")
    assert commit is not None
    return commit, files


def _hub_file(item: object) -> HubFile:
    lfs = getattr(item, "lfs", None)
    if lfs is not None:
        return HubFile(int(lfs.size), "sha256", str(lfs.sha256))
    return HubFile(int(item.size), "git-sha1", str(item.blob_id))  # type: ignore[attr-defined]


def _is_sound(named: tuple[str, HubFile]) -> bool:
    path, file = PurePosixPath(named[0]), named[1]
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and file.size >= 0 and _DIGESTS[file.algorithm].fullmatch(file.digest) is not None


@contextmanager
def asking(what: str, *, code: str, file: object, kept: str | None = None, hint: str | None = None) -> Iterator[None]:
    """Run calls of huggingface_hub: whatever goes wrong becomes a MachineError with the way out, and tells no token.

    `hint` is the way out where the reason has none of its own. Keep the block to the calls: what it raises is taken for
    the hub's fault, a GoraError apart.
    """
    try:
        with _quiet_about_tokens():
            yield
    except GoraError:
        raise
    except Exception as err:  # of httpx, of the hub's library, of Xet's: they share no class
        raise MachineError(
            what, code=code, file=str(file), actual=_reason(err), kept=kept, hint=_way_out(err) or hint
        ) from err


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from: the library wraps what a server answered."""
    while err is not None:
        yield err
        err = err.__cause__ or err.__context__


def _reason(err: Exception) -> str:
    """Say what went wrong in a line: the exception, and what the server says of it or what lies at its root."""
    chain = list(_chain(err))
    said = [getattr(one, "server_message", None) for one in chain]
    texts = [err, *(filter(None, said) if any(said) else chain[-1:])]
    lines = [next((line.strip() for line in str(text).splitlines() if line.strip()), "") for text in texts]
    return without_tokens("; ".join(dict.fromkeys(filter(None, lines))) or type(err).__name__)


def _way_out(err: Exception) -> str | None:
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set: unset it, and run this once where there is a network"
    for one in _chain(err):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(one, errors.GatedRepoError):
            return "accept its conditions on its page, then log in: hf auth login, or HF_TOKEN"
        if isinstance(one, errors.RepositoryNotFoundError) or status in (401, 403):
            return "check the spelling; for a private repository, or to write: hf auth login, or HF_TOKEN"
        if isinstance(one, errors.RevisionNotFoundError):
            return "the repository is there, this branch, tag or commit is not: its page lists them"
    return None


def without_tokens(text: str) -> str:
    """Return `text` with the hub's tokens taken out: the one in use, and whatever looks like one."""
    for token in _tokens():
        text = text.replace(token, HIDDEN)
    return _TOKENS.sub(HIDDEN, text)


def _tokens() -> set[str]:
    """The token of HF_TOKEN and that of the hub's login. Read from their places: asking the library may use the net."""
    found = {os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    with suppress(OSError, ValueError, RuntimeError):  # no login
        found.add(Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser().read_text().strip())
    return {token for token in found if len(token) >= 4}


@contextmanager
def _quiet_about_tokens() -> Iterator[None]:
    """Keep tokens out of everything that is logged meanwhile: the hub's library repeats what a server says."""
    make = logging.getLogRecordFactory()

    def make_without(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        record.msg, record.args = without_tokens(record.getMessage()), None
        return record

    logging.setLogRecordFactory(make_without)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
