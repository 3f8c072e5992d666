"""The store: what is in it is what was verified, whoever writes beside it, and whatever the disk does."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gora_serve.errors import MachineError, MismatchError
from gora_serve.serving.store import Content, Store, content_of, held, hold
from serving.corpus import CONFIG, WEIGHTS, write_sound

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "adapter", SHAPES)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_copy_that_nobody_can_change(adapter: Path, store: Store) -> None:
    content = content_of(adapter)
    entry = store.put(adapter, content)
    assert entry == store.place(content)
    assert content.root.endswith(entry.name.split("-")[0])
    assert sorted(path.name for path in entry.iterdir()) == [CONFIG, WEIGHTS]
    for name in (CONFIG, WEIGHTS):
        assert (entry / name).read_bytes() == (adapter / name).read_bytes()
        assert (entry / name).stat().st_ino != (adapter / name).stat().st_ino
        assert stat.S_IMODE((entry / name).stat().st_mode) == 0o400
    assert stat.S_IMODE(entry.stat().st_mode) == 0o500
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert names(store) == [entry.name]


def test_scales_are_part_of_the_name(adapter: Path, store: Store) -> None:
    """Tensors alone do not make an adapter: with another alpha it is another one, at another path."""
    one = store.put(adapter, content_of(adapter))
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    two = store.put(adapter, content_of(adapter))
    assert one != two
    assert len(names(store)) == 2


def test_an_entry_is_used_again_and_hashed_again(adapter: Path, store: Store) -> None:
    content = content_of(adapter)
    entry = store.put(adapter, content)
    inode = (entry / WEIGHTS).stat().st_ino
    os.utime(entry, (1, 1))
    assert store.put(adapter, content) == entry
    assert (entry / WEIGHTS).stat().st_ino == inode
    assert time.time() - entry.stat().st_mtime < 60


@pytest.mark.parametrize("damage", ["bit", "file", "extra", "link"])
def test_a_damaged_entry_is_replaced(adapter: Path, store: Store, damage: str, tmp_path: Path) -> None:
    content = content_of(adapter)
    entry = store.put(adapter, content)
    entry.chmod(0o700)
    if damage == "bit":
        (entry / WEIGHTS).chmod(0o600)
        raw = bytearray((entry / WEIGHTS).read_bytes())
        raw[-1] ^= 1
        (entry / WEIGHTS).write_bytes(raw)
    elif damage == "file":
        (entry / CONFIG).unlink()
    elif damage == "extra":
        (entry / "adapter_model.bin").write_bytes(b"x")
    else:
        entry.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").chmod(0o700)
        entry.mkdir()
        (entry / WEIGHTS).symlink_to(tmp_path / "nowhere")
    assert store.put(adapter, content) == entry
    assert content_of(entry) == content
    assert names(store) == [entry.name]


def test_another_content_than_was_verified_is_not_published(adapter: Path, store: Store) -> None:
    with pytest.raises(MismatchError, match="GS-101"):
        store.put(adapter, Content(f"gb1:sha256:{'0' * 64}", content_of(adapter).rest))
    assert names(store) == []


def test_too_little_space_is_told_before(adapter: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    none = SimpleNamespace(f_bavail=1, f_frsize=1000, f_blocks=10)
    monkeypatch.setattr(os, "statvfs", lambda path: none if str(path).startswith(str(store.folder)) else real(path))
    with pytest.raises(MachineError, match="GS-560") as caught:
        store.put(adapter, content_of(adapter))
    assert caught.value.exit_code == 5
    assert "1000" in str(caught.value.fields["actual"])
    assert names(store) == []


LIMITED = """
import resource, signal, sys
from collections.abc import Callable
from pathlib import Path
from gora_serve.errors import GoraError
from gora_serve.serving.store import Store, content_of
adapter, store = Path(sys.argv[1]), Store(Path(sys.argv[2]))
content = content_of(adapter)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    store.put(adapter, content)
except GoraError as err:
    print(err.code, err.exit_code)
"""


def test_a_disk_that_takes_no_more(adapter: Path, store: Store) -> None:
    """A real write that fails half way: exit status 5, and nothing is left."""
    words = [sys.executable, "-c", LIMITED, str(adapter), str(store.folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "GS-505 5\n"
    assert names(store) == []


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_failing_call_leaves_nothing(adapter: Path, store: Store, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(MachineError, match="GS-505"):
        store.put(adapter, content_of(adapter))
    assert names(store) == []


def test_a_store_that_others_can_write_to_is_refused(adapter: Path, store: Store) -> None:
    store.folder.mkdir()
    store.folder.chmod(0o777)
    with pytest.raises(MachineError, match="GS-5351"):
        store.put(adapter, content_of(adapter))
    assert names(store) == []


def test_a_store_that_is_a_file_is_refused(adapter: Path, store: Store) -> None:
    store.folder.write_text("")
    with pytest.raises(MachineError, match="GS-5351"):
        store.put(adapter, content_of(adapter))


def test_old_entries_go_unless_a_server_holds_them(tmp_path: Path, store: Store) -> None:
    entries = []
    for seed in range(3):
        folder = write_sound(tmp_path / f"a{seed}", SHAPES, seed=seed)
        entries.append(store.put(folder, content_of(folder)))
    for entry in entries[:2]:
        os.utime(entry, (1, 1))
    with held([entries[0]]):
        assert store.sweep() == [entries[1].name]
    assert names(store) == sorted([entries[0].name, entries[2].name])
    assert store.sweep() == [entries[0].name]
    with pytest.raises(MachineError, match="GS-5352"):
        hold(entries[0])


def test_what_killed_processes_left_is_swept(adapter: Path, store: Store) -> None:
    entry = store.put(adapter, content_of(adapter))
    (store.folder / ".trash-0123456789abcdef").mkdir()
    stage = store.folder / f".{entry.name}.gora-1-01234567.tmp"
    stage.mkdir()
    (store.folder / "of-somebody").mkdir()
    store.sweep()
    assert names(store) == sorted([entry.name, stage.name, "of-somebody"])  # that copy may be at work
    os.utime(stage, (1, 1))
    store.sweep()
    assert names(store) == sorted([entry.name, "of-somebody"])


def _put(adapter: Path, folder: Path, barrier: Any, answers: Any) -> None:
    barrier.wait()
    entry = Store(folder).put(adapter, content_of(adapter))
    answers.put(entry.name)


def test_servers_that_start_together_share_one_copy(adapter: Path, store: Store) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_put, args=(adapter, store.folder, barrier, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found == {content_of(adapter).key}
    assert names(store) == [content_of(adapter).key]


def test_the_default_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    assert Store().folder == tmp_path / "cache" / "adapters"


def test_a_small_disk_is_told_before_anything_is_written(adapter: Path, small_disk: Callable[[int], Path]) -> None:
    store = Store(small_disk(64) / "store")
    with pytest.raises(MachineError, match="GS-560"):
        store.put(adapter, content_of(adapter))
    assert names(store) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    tmp_path: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the space after it was counted: the write itself fails."""
    from gora_serve.serving import store as module

    monkeypatch.setattr(module, "require_space", lambda *_: None)
    folder = write_sound(tmp_path / "large", {"model.layers.0.self_attn.q_proj": (20_000, 20_000)})
    store = Store(small_disk(64) / "store")
    with pytest.raises(MachineError, match="GS-505"):
        store.put(folder, content_of(folder))
    assert names(store) == []
    small = write_sound(tmp_path / "small", SHAPES)
    assert store.put(small, content_of(small)).is_dir(), "the space is free again"
