"""`verify --against hub`: the digests that the hub reports against the files here, without a download."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from hub_server import Hub, git_sha1

from gora_serve.errors import MachineError, UsageError
from gora_serve.integrity.against_hub import AgainstHub, verify_against_hub
from gora_serve.integrity.bases import locate_base

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def copy(hub: Hub, tiny_base: Path, tmp_path: Path) -> Path:
    """A local copy of org/tiny, which has a model card and pickled weights too."""
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    hub.add("org/tiny", files | {"README.md": b"# tiny\n", "pytorch_model.bin": b"x"})
    return shutil.copytree(tiny_base, tmp_path / "copy")


def states(compared: AgainstHub) -> dict[str, str]:
    return {file.path: file.state for file in compared.files if file.state != "equal"}


def test_a_copy_is_proved_without_a_download(hub: Hub, copy: Path) -> None:
    compared = verify_against_hub(str(copy), "org/tiny@main")
    assert states(compared) == {"README.md": "not here", "pytorch_model.bin": "not here"}
    assert not compared.faults
    assert compared.commit == hub.repos["org/tiny"].refs["main"]
    assert len(compared.files) == len(list(copy.iterdir())) + 2
    algorithms = {file.path: file.algorithm for file in compared.files}
    assert (algorithms[SHARD], algorithms["config.json"]) == ("sha256", "git-sha1")
    assert all(method == "GET" and "/api/" in path for method, path, _ in hub.asked)


def test_every_fault_is_named(hub: Hub, copy: Path) -> None:
    data = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (copy / "config.json").write_text("{}")
    (copy / "tokenizer.json").unlink()
    (copy / "notes.txt").write_text("mine")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "x.metadata").write_text("")
    compared = verify_against_hub(str(copy), "org/tiny")
    assert {file.path: file.state for file in compared.faults} == {
        SHARD: "differs", "config.json": "differs", "tokenizer.json": "missing", "notes.txt": "extra",
    }  # fmt: skip
    by_name = {file.path: file for file in compared.files}
    assert by_name[SHARD].expected == hashlib.sha256(data).hexdigest()
    assert by_name[SHARD].actual == hashlib.sha256((copy / SHARD).read_bytes()).hexdigest()
    assert by_name["config.json"].actual == git_sha1(b"{}")
    assert (by_name["tokenizer.json"].actual, by_name["notes.txt"].expected) == (None, None)
    assert compared.to_json()["verified"] is False


def test_what_need_not_be_here_is_compared_where_it_is(hub: Hub, copy: Path) -> None:
    (copy / "README.md").write_text("# another\n")
    assert states(verify_against_hub(str(copy), "org/tiny"))["README.md"] == "differs"


def test_a_snapshot_by_its_id_and_by_its_path(hub: Hub, copy: Path) -> None:
    with pytest.raises(MachineError, match="GS-552") as caught:
        verify_against_hub("org/tiny@main")
    assert hub.repos["org/tiny"].refs["main"] in str(caught.value.fields["actual"])
    base = locate_base("org/tiny@main")
    for name in ("org/tiny@main", "org/tiny", f"org/tiny@{base.revision}", str(base.path)):
        compared = verify_against_hub(name)
        assert (compared.path.resolve(), compared.commit, compared.faults) == (base.path.resolve(), base.revision, ())
    hub.add("org/tiny", {"config.json": b"{}"})
    assert not verify_against_hub(str(base.path)).faults, "a snapshot is its commit, whatever main is now"
    with pytest.raises(MachineError, match="GS-552"):
        verify_against_hub("org/tiny@main")
    blob = (base.path / SHARD).resolve()
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    assert states(verify_against_hub(str(base.path)))[SHARD] == "differs"


def test_a_folder_of_which_nothing_is_known(hub: Hub, copy: Path) -> None:
    with pytest.raises(UsageError, match="GS-262"):
        verify_against_hub(str(copy))
    with pytest.raises(MachineError, match="GS-503"):
        verify_against_hub(str(copy / "none"), "org/tiny")
    with pytest.raises(UsageError, match="GS-261"):
        verify_against_hub(str(copy / "none"))
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached(hub: Hub, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="GS-551") as caught:
        verify_against_hub(str(copy), "org/tiny")
    assert "HF_HUB_OFFLINE is set" in str(caught.value.fields["try"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="GS-551"):
        verify_against_hub(str(copy), "org/tiny")
