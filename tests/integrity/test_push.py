"""Pushing an adapter to the hub: one commit, checked afterwards by the hub's own digests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import Hub

from gora_serve.adapter.factors import Adapter
from gora_serve.errors import MachineError, MismatchError, UsageError
from gora_serve.integrity.against_hub import verify_against_hub
from gora_serve.integrity.bases import locate_adapter
from gora_serve.integrity.binding import check_folder, seal_folder
from gora_serve.integrity.push import push_folder, push_target
from gora_serve.integrity.verify import verify_adapter
from gora_serve.training.export import export_adapter

# The hub's library passes a file to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

NAMES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "gora_manifest.json"}


@pytest.fixture
def adapter(hub: Hub, tiny_adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hub.tokens.add("a-token-of-mine")
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    return export_adapter(tiny_adapter, tmp_path / "adapter").folder


def test_push_and_pull(hub: Hub, adapter: Path) -> None:
    pushed = push_folder(adapter, "org/adapter")
    repo = hub.repos["org/adapter"]
    assert (pushed.repo, pushed.commit, pushed.private) == ("org/adapter", repo.refs["main"], True)
    assert pushed.url == f"{hub.url}/org/adapter/commit/{pushed.commit}"
    assert set(pushed.files) == NAMES
    assert repo.private
    assert set(repo.commits[pushed.commit]) == NAMES | {".gitattributes"}
    assert len(repo.commits) == 2, "the repository's first commit, and ours"
    folder = locate_adapter(f"org/adapter@{pushed.commit}")
    assert {name: (folder / name).read_bytes() for name in NAMES} == {n: (adapter / n).read_bytes() for n in NAMES}
    assert verify_adapter(folder).root == verify_adapter(adapter).root


def test_with_xet_switched_on(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This hub has no Xet: downloads go on without, and what its library says of an upload is an error like others."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    pushed = push_folder(adapter, "org/adapter")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    verify_adapter(locate_adapter(f"org/adapter@{pushed.commit}"))
    with pytest.raises(MachineError, match="GS-553") as caught:
        push_folder(adapter, "org/another")
    assert "xet" in str(caught.value.fields["actual"])
    check_folder(adapter)


def test_pushing_again_sends_nothing_again(hub: Hub, adapter: Path) -> None:
    first = push_folder(adapter, "org/adapter")
    uploads = len(hub.requests("PUT", "/lfs/"))
    again = push_folder(adapter, "org/adapter")
    assert again.commit == first.commit
    assert len(hub.requests("PUT", "/lfs/")) == uploads == 1


def test_a_receipt_of_an_earlier_adapter_is_taken_away(hub: Hub, adapter: Path) -> None:
    """A converted adapter has conversion.json; a seal of the next one does not name it."""
    hub.add("org/adapter", {"conversion.json": b"{}", "LICENSE": b"free", "notes.json": b"{}"}, private=True)
    pushed = push_folder(adapter, "org/adapter")
    there = set(hub.repos["org/adapter"].commits[pushed.commit])
    assert there == NAMES | {"LICENSE", "notes.json"}
    assert pushed.others == ("notes.json",)


def test_public_only_when_asked_for(hub: Hub, adapter: Path) -> None:
    assert not push_folder(adapter, "org/open", public=True).private
    assert not hub.repos["org/open"].private
    hub.add("org/known", {"LICENSE": b""})
    with pytest.raises(UsageError, match="GS-263") as caught:
        push_folder(adapter, "org/known")
    assert "--public" in str(caught.value.fields["try"])
    assert set(hub.repos["org/known"].commits[hub.repos["org/known"].refs["main"]]) == {"LICENSE"}


def swap(hub: Hub) -> None:
    hub.faults.swap["adapter_model.safetensors"] = b"other bytes"


def drop(hub: Hub) -> None:
    hub.faults.swap["README.md"] = b""


@pytest.mark.parametrize(("fault", "name"), [(swap, "adapter_model.safetensors"), (drop, "README.md")])
def test_a_hub_that_holds_other_bytes(hub: Hub, adapter: Path, fault: Callable[[Hub], None], name: str) -> None:
    fault(hub)
    with pytest.raises(MismatchError, match="GS-126") as caught:
        push_folder(adapter, "org/adapter")
    assert name in caught.value.what
    assert str(adapter) in str(caught.value.fields["kept"])
    check_folder(adapter)


@pytest.mark.parametrize("where", ["/preupload/", "/lfs/objects/batch", "/lfs/verify", "/commit/", "/api/repos/create"])
def test_a_push_that_fails_leaves_the_export(hub: Hub, adapter: Path, where: str) -> None:
    hub.faults.deny[where] = 403
    with pytest.raises(MachineError, match="GS-553") as caught:
        push_folder(adapter, "org/adapter")
    assert caught.value.fields["kept"] == f"the adapter is complete in {adapter}"
    check_folder(adapter)
    repo = hub.repos.get("org/adapter")
    assert repo is None or set(repo.commits[repo.refs["main"]]) == {".gitattributes"}


def test_a_commit_that_cannot_be_compared(hub: Hub, adapter: Path) -> None:
    hub.faults.deny["/tree/"] = 403
    with pytest.raises(MachineError, match="GS-551") as caught:
        push_folder(adapter, "org/adapter")
    commit = hub.repos["org/adapter"].refs["main"]
    assert f"the commit {commit} was made" in str(caught.value.fields["kept"])
    hub.faults.deny.clear()
    words = str(caught.value.fields["try"]).split()
    assert not verify_against_hub(words[2], words[-1]).faults


def test_without_a_token(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(MachineError, match="GS-553") as caught:
        push_folder(adapter, "org/adapter")
    assert "hf auth login, or HF_TOKEN" in str(caught.value.fields["try"])


def test_a_commit_of_somebody_else_meanwhile(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is made on the head that was looked at, or not at all."""
    from huggingface_hub import HfApi

    real = HfApi.create_commit

    def late(self: HfApi, *args: object, **named: object) -> object:
        hub.add("org/adapter", {"theirs.json": b"{}"})
        return real(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(MachineError, match="GS-553"):
        push_folder(adapter, "org/adapter")
    repo = hub.repos["org/adapter"]
    assert set(repo.commits[repo.refs["main"]]) == {"theirs.json"}


def test_a_folder_that_is_not_whole_is_not_pushed(hub: Hub, adapter: Path) -> None:
    (adapter / "README.md").write_text("edited")
    with pytest.raises(MismatchError, match="GS-102"):
        push_folder(adapter, "org/adapter")
    assert hub.asked == []


@pytest.mark.parametrize(
    "text", ["", "name", "org/name@main", "../name", "/org/name", "org/name/x", "org/na me", "org/.."]
)
def test_targets_that_are_none(hub: Hub, text: str) -> None:
    with pytest.raises(UsageError, match="GS-261"):
        push_target(text)
    assert hub.asked == []


def test_a_base_with_a_path_for_a_name(hub: Hub, adapter: Path) -> None:
    """The hub refuses a model card whose base_model is no id, so a path is not put there."""
    card = (adapter / "README.md").read_text()
    assert "base_model:" not in card
    (adapter / "README.md").write_text(card.replace("---\n", "---\nbase_model: /home/me/base\n", 1))
    seal = check_seal(adapter)
    seal_folder(adapter, seal)
    with pytest.raises(MachineError, match="GS-553") as caught:
        push_folder(adapter, "org/adapter")
    assert "base_model" in str(caught.value.fields["actual"])


def check_seal(folder: Path) -> dict[str, object]:
    import json

    value = json.loads((folder / "gora_manifest.json").read_text())
    return {name: item for name, item in value.items() if name not in ("schema", "files", "status", "seal")}
