"""Pushing an exported adapter to the hub: one commit, then the hub's digests of that commit against ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gora_serve.errors import MachineError, MismatchError, UsageError
from gora_serve.integrity.against_hub import compare
from gora_serve.integrity.binding import check_folder
from gora_serve.integrity.hub import HubId, asking, list_commit, parse_id, without_tokens
from gora_serve.integrity.snapshots import ADAPTER, matches
from gora_serve.integrity.staging import SEAL

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelInfo

RECEIPT = "conversion.json"  # the one file that some of our adapters have and others do not


@dataclass(frozen=True)
class Pushed:
    """A commit of the hub that holds an adapter, byte for byte as it lies here.

    others: further files of the repository, which a download of the adapter would bring along.
    """

    repo: str
    commit: str
    url: str
    private: bool
    files: tuple[str, ...]
    others: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "files": list(self.files), "others": list(self.others), "verified": True}


def push_target(text: str) -> str:
    """Return the repository that `text` names. Raises UsageError (GS-261) for anything but `org/name`."""
    if "/" not in text or "@" in text:
        raise UsageError(
            "not a repository to push to", code="GS-261", expected="org/name", actual=text,
            hint="a push goes to the main branch of the repository; the commit is printed",
        )  # fmt: skip
    return parse_id(text).repo


def push_folder(folder: Path, repo: str, *, public: bool = False) -> Pushed:
    """Upload a sealed adapter folder as one commit to `repo`, made private unless it is there or `public` is set.

    The local files stay as they are, whatever happens. Raises MismatchError (GS-102 to GS-104 the folder is not whole,
    GS-126 the hub holds other bytes than were sent), UsageError (GS-263 a public repository without `public`),
    MachineError (GS-553; GS-551 where the commit was made and then could not be compared).
    """
    repo = push_target(repo)
    sealed = check_folder(folder)
    names = [*sorted(_files(sealed)), SEAL]
    kept = f"the adapter is complete in {folder}"
    hint = (
        "check the network and run it again (with --overwrite, as the output exists): what was sent is not sent again"
    )
    with asking("the adapter was not pushed", code="GS-553", file=repo, kept=kept, hint=hint):
        from huggingface_hub import HfApi

        api = HfApi()
        info = _make_ready(api, repo, public=public, kept=kept)
        done = _commit(api, folder, info, names, message=f"Adapter {sealed.get('adapter_root')}")
    others = _check(folder, HubId(repo, done.oid), names, kept)
    return Pushed(repo, done.oid, without_tokens(done.commit_url), bool(info.private), tuple(names), others)


def _files(sealed: dict[str, object]) -> dict[str, object]:
    files = sealed["files"]
    assert isinstance(files, dict)
    return files


def _make_ready(api: HfApi, repo: str, *, public: bool, kept: str) -> ModelInfo:
    """Make the repository where it is not there, and return what the hub says of it."""
    api.create_repo(repo, private=not public, exist_ok=True)
    info = api.model_info(repo)
    if not info.private and not public:
        raise UsageError(
            "this repository is public, so everybody could read the adapter", code="GS-263", file=repo, kept=kept,
            hint="pass --public if that is meant, or make the repository private on its page",
        )  # fmt: skip
    return info


def _commit(api: HfApi, folder: Path, info: ModelInfo, names: list[str], *, message: str) -> CommitInfo:
    """Upload the files in one commit, on the head that `info` tells of and on no other."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in names]
    if RECEIPT not in names and RECEIPT in {sibling.rfilename for sibling in info.siblings or ()}:
        operations.append(CommitOperationDelete(RECEIPT))
    return api.create_commit(info.id, operations, commit_message=message, parent_commit=info.sha)


def _check(folder: Path, which: HubId, names: list[str], kept: str) -> tuple[str, ...]:
    """Compare what the hub says of the commit with our files; return the repository's other files that matter."""
    try:
        commit, there = list_commit(which)
    except MachineError as err:
        hint = f"gora-serve verify {folder} --against hub --repo {which}"
        raise err.keeping(f"{kept}; the commit {which.revision} was made, and not compared yet", hint=hint) from err
    wrong = [file for file in compare(folder, there) if file.path in names and file.state != "equal"]
    if wrong:
        raise MismatchError(
            f"the hub holds other bytes than were sent: {', '.join(file.path for file in wrong)}", code="GS-126",
            file=f"{which.repo}/{wrong[0].path} at {commit}", expected=wrong[0].actual,
            actual=wrong[0].expected or "no such file", kept=kept,
            hint="push again; until then take no adapter from this commit",
        )  # fmt: skip
    return tuple(sorted(name for name in there if name not in names and matches(name, ADAPTER)))
