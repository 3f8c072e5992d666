"""Bases and adapters from the hub: pinned to a commit, checked file by file, resumed, offline."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_server import Hub

from gora_serve.errors import GoraError, InputError, MachineError, MismatchError
from gora_serve.integrity.bases import locate_adapter, locate_base, locate_settings
from gora_serve.integrity.hub import HubId
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.snapshots import SETTINGS, download, snapshot_id
from gora_serve.integrity.verify import find_adapter

SHARD = "model-00001-of-00002.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(hub: Hub, tiny_base: Path) -> str:
    """The tiny base at org/tiny, beside files that no base needs; its commit."""
    other = {"README.md": b"# tiny\n", ".gitattributes": b"*\n", "pytorch_model.bin": b"not wanted"}
    return hub.add("org/tiny", files_of(tiny_base) | other)


def refused(call: object, error: type[GoraError], code: str) -> GoraError:
    with pytest.raises(error, match=code) as caught:
        call()  # type: ignore[operator]
    return caught.value


def test_a_base_is_pinned_to_its_commit(hub: Hub, published: str, tiny_base: Path) -> None:
    hub.repos["org/tiny"].refs["v1"] = published
    for name in ("org/tiny", "org/tiny@main", "org/tiny@v1", f"org/tiny@{published}"):
        base = locate_base(name)
        assert (base.name, base.revision, base.path.name) == ("org/tiny", published, published)
    assert hash_model(base.path).roots == hash_model(tiny_base).roots
    assert not (base.path / "pytorch_model.bin").exists()
    assert snapshot_id(base.path) == HubId("org/tiny", published)
    assert len(hub.requests("GET", "/resolve/")) == len(files_of(tiny_base))


def test_a_branch_moves_and_a_commit_does_not(hub: Hub, published: str, tiny_base: Path) -> None:
    assert locate_base("org/tiny@main").revision == published
    files = files_of(tiny_base)
    new = hub.add("org/tiny", files | {"config.json": files["config.json"] + b"\n"})
    assert locate_base("org/tiny@main").revision == new
    assert locate_base(f"org/tiny@{published}").path.name == published


def test_settings_are_the_json_files_alone(hub: Hub, published: str) -> None:
    base = locate_settings("org/tiny@main")
    assert base.revision == published
    assert {path.suffix for path in base.path.iterdir()} == {".json"}
    locate_base("org/tiny@main")
    assert (base.path / SHARD).exists()


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_download_that_is_not_what_the_hub_promised(hub: Hub, published: str, name: str) -> None:
    """In LFS by its SHA-256, a small file by git's SHA-1; it is deleted and downloaded again, it alone."""
    hub.faults.flip.add(name)
    for _ in range(2):  # the fault stays
        error = refused(lambda: locate_base("org/tiny@main"), MismatchError, "GS-105")
        assert name in error.what
    blob = Path(str(error.fields["file"]))
    assert blob.name == error.fields["expected"] != error.fields["actual"]
    assert "delete this file" in str(error.fields["try"])
    hub.faults.flip.clear()
    blob.unlink()
    before = len(hub.requests("GET", "/resolve/"))
    locate_base("org/tiny@main")
    assert [path for _, path, _ in hub.requests("GET", "/resolve/")[before:]] == [
        f"/org/tiny/resolve/{published}/{name}"
    ]


@pytest.mark.parametrize("how", ["flip", "shorten"])
def test_a_blob_that_was_damaged_later(hub: Hub, published: str, how: str) -> None:
    path = locate_base("org/tiny@main").path / SHARD
    blob = path.resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + (b"" if how == "shorten" else bytes([data[-1] ^ 1])))
    error = refused(lambda: locate_base("org/tiny@main"), MismatchError, "GS-105")
    assert error.fields["file"] == blob
    assert error.fields["expected"] == (f"{len(data)} bytes" if how == "shorten" else hashlib.sha256(data).hexdigest())


def test_several_damaged_files_are_all_named(hub: Hub, published: str) -> None:
    hub.faults.flip |= {SHARD, "config.json"}
    error = refused(lambda: locate_base("org/tiny"), MismatchError, "GS-105")
    assert "config.json" in error.what
    assert SHARD in error.what


def test_a_file_that_nobody_published(hub: Hub, published: str) -> None:
    folder = locate_base("org/tiny").path
    (folder / "adapter_config.json").write_text("{}")
    error = refused(lambda: locate_base("org/tiny"), MismatchError, "GS-123")
    assert error.fields["file"] == folder / "adapter_config.json"
    assert "adapter_config.json" in error.what


def test_a_link_that_leaves_the_cache(hub: Hub, published: str, tmp_path: Path) -> None:
    path = locate_base("org/tiny").path / "config.json"
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    refused(lambda: locate_base("org/tiny"), InputError, "GS-325")


def test_files_are_hashed_once(hub: Hub, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gora_serve.integrity import snapshots

    hashed: list[str] = []
    monkeypatch.setattr(snapshots, "sha256_file", lambda path: hashed.append(path.name) or _sha256(path))
    folder = locate_base("org/tiny").path
    first = len(hashed)
    assert first == len(list(folder.iterdir()))
    locate_base("org/tiny")
    assert len(hashed) == first
    (folder / SHARD).resolve().touch()
    locate_base("org/tiny")
    assert len(hashed) == first + 1


def _sha256(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def test_copies_instead_of_links(hub: Hub, published: str) -> None:
    """Where the cache has no symlinks, the listing alone says what was promised, of LFS files too."""
    folder = locate_base("org/tiny").path
    for path in folder.iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    locate_base("org/tiny")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    error = refused(lambda: locate_base("org/tiny"), MismatchError, "GS-105")
    assert error.fields["file"] == folder / SHARD


def test_the_store_that_repositories_share(hub: Hub, published: str) -> None:
    """What came through Xet lies there, under a name that is no SHA-256 of it; the blob is a link."""
    folder = locate_base("org/tiny").path
    blob = (folder / SHARD).resolve()
    store = folder.parent.parent.parent / "blobs"
    shared = store / "ab" / ("ab" + "0" * 62)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    refused(lambda: locate_base("org/tiny"), InputError, "GS-325")  # a folder that is no such store
    (store / ".huggingface-shared-blobs").write_text("1\n")
    hash_model(locate_base("org/tiny").path)
    data = shared.read_bytes()
    shared.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for call in (lambda: locate_base("org/tiny"), lambda: hash_model(folder)):
        error = refused(call, MismatchError, "GS-105")
        assert (error.fields["file"], error.fields["expected"]) == (shared, blob.name)


def test_a_broken_connection_goes_on_where_it_stopped(
    hub: Hub, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last piece that came whole; the library's pieces are 10 MB."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.faults.cut[SHARD] = 33_000
    locate_base("org/tiny")
    ranges = [asked for _, path, asked in hub.requests("GET", "/resolve/") if path.endswith(SHARD)]
    assert ranges == [None, "bytes=32768-"]


def test_what_is_complete_is_kept_when_the_hub_goes_away(hub: Hub, published: str) -> None:
    hub.faults.deny[f"/resolve/{published}/{SHARD}"] = 403
    error = refused(lambda: locate_base("org/tiny"), MachineError, "GS-521")
    assert "HF_TOKEN" in str(error.fields["try"])
    done = {path for _, path, _ in hub.requests("GET", "/resolve/") if SHARD not in path}
    hub.faults.deny.clear()
    locate_base("org/tiny")
    again = [path for _, path, _ in hub.requests("GET", "/resolve/") if SHARD not in path]
    assert done
    assert len(again) == len(set(again))


def test_offline_with_and_without_the_snapshot(hub: Hub, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    download(HubId("org/tiny", "main"), SETTINGS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(lambda: locate_base("org/tiny@main"), MachineError, "GS-521")  # the weights are not here
    assert "HF_HUB_OFFLINE is set" in str(error.fields["try"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    locate_base("org/tiny@main")
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_base("org/tiny@main").revision == published
    assert locate_base(f"org/tiny@{published}").revision == published
    for name in ("org/tiny@v2", "org/other@main", f"org/tiny@{'0' * 40}"):
        error = refused(lambda name=name: locate_base(name), MachineError, "GS-521")  # type: ignore[misc]
        assert error.fields["file"] == name
    blob = (locate_base("org/tiny@main").path / SHARD).resolve()
    blob.write_bytes(b"\0" * blob.stat().st_size)
    refused(lambda: locate_base("org/tiny@main"), MismatchError, "GS-105")
    assert len(hub.asked) == asked


def test_a_private_repository(hub: Hub, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("org/secret", files_of(tiny_base), private=True)
    error = refused(lambda: locate_base("org/secret"), MachineError, "GS-521")
    assert "hf auth login, or HF_TOKEN" in str(error.fields["try"])
    hub.tokens.add("a-token-of-mine")
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    assert locate_base("org/secret").revision == commit


def test_a_repository_that_holds_neither(hub: Hub) -> None:
    hub.add("org/empty", {"picture.png": b"nothing"})
    refused(lambda: locate_base("org/empty"), InputError, "GS-366")
    refused(lambda: find_adapter(locate_adapter("org/empty@main")), InputError, "GS-346")


def test_an_adapter_is_pulled_whole(hub: Hub) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 400, "README.md": b"# a\n"}
    commit = hub.add("org/adapter", files | {"picture.png": b"p"})
    folder = locate_adapter("org/adapter@main")
    assert folder.name == commit
    assert files_of(folder) == files
    hub.faults.flip.add("README.md")
    hub.add("org/adapter", files | {"README.md": b"# b\n"})
    refused(lambda: locate_adapter("org/adapter@main"), MismatchError, "GS-105")
