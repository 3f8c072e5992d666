"""The cache of level L0 saves reading and proves nothing; a stale, damaged or foreign entry is passed over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import base_tensors, bound_adapter, save_base

from gora_serve.errors import MismatchError
from gora_serve.integrity import cache as module
from gora_serve.integrity import hashing
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.cache import Digests, QuickCache, cache_folder
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.levels import Level
from gora_serve.integrity.manifest import hash_adapter, hash_model
from gora_serve.integrity.record import WEIGHTS, read_record
from gora_serve.integrity.verify import verify_adapter, verify_base


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own that trusts files as young as those of a test."""
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MARGIN", -(10**12))
    return tmp_path / "cache" / "stat"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    names = sorted(base_tensors())
    return save_base(tmp_path / "base", base_tensors(), [names[::2], names[1::2]])


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a weight file was read")

        monkeypatch.setattr(hashing, "pieces", refuse)

    return forbid


def entries(place: Path) -> list[Path]:
    return sorted(place.iterdir())


def test_levels() -> None:
    assert [level.value for level in Level] == ["L0 stat", "L1 header", "L2 full bytes", "L3 memory"]
    assert [level.name for level in Level if level.verifies] == ["BYTES", "MEMORY"]


def test_the_second_time_no_weights_are_read(base: Path, place: Path, no_reading: Callable[[], None]) -> None:
    fresh = QuickCache()
    first = hash_model(base, cache=fresh)
    assert fresh.level is Level.BYTES
    assert first == hash_model(base)
    assert len(entries(place)) == 2
    (base / "config.json").unlink()  # small files are hashed anyway
    no_reading()
    again = QuickCache()
    assert hash_model(base, cache=again).tensors == first.tensors
    assert again.level is Level.STAT


def test_without_the_flag_nothing_is_cached(base: Path, place: Path) -> None:
    hash_model(base)
    sha256_file(base / "config.json")
    assert not place.exists()


def test_one_changed_file_is_read_and_found(base: Path) -> None:
    hash_model(base, cache=QuickCache())
    path = base / "part-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    again = QuickCache()
    assert hash_model(base, cache=again) == hash_model(base)
    assert again.reused == 1


@pytest.mark.parametrize("change", ["times", "copy", "size", "inode"])
def test_a_stale_entry_is_passed_over(base: Path, change: str, tmp_path: Path) -> None:
    path = base / "config.json"
    sha256_file(path, QuickCache())
    if change == "times":
        os.utime(path, ns=(1, 1))
    elif change == "size":
        path.write_text(path.read_text() + " ")
    else:
        other = shutil.copy2(path, tmp_path / "copy")
        path = Path(other) if change == "copy" else Path(other).replace(path)
    again = QuickCache()
    assert sha256_file(path, again) == sha256_file(path)
    assert again.reused == 0


def damaged(text: str) -> dict[str, str | bytes]:
    value = json.loads(text)
    other = {**value, "sha256": "0" * 64}
    return {
        "empty": "", "cut": text[:-5], "not JSON": "\x00\x01", "not UTF-8": b"\xff\xfe", "a list": "[]", "null": "null",
        "another digest": json.dumps(other), "no check": json.dumps({n: v for n, v in value.items() if n != "check"}),
        "another schema": text.replace("stat-cache/1", "stat-cache/2"), "deep": "[" * 5000, "a bomb": '"' + "x" * 1000,
        "another file": text.replace(value["identity"][1], "1"), "numbers": json.dumps(dict.fromkeys(value, 3)),
        "nulls": json.dumps(dict.fromkeys(value)),
    }  # fmt: skip


@pytest.mark.parametrize("name", damaged('{"identity": ["0", "0"], "sha256": "", "check": ""}'))
def test_a_damaged_entry_is_passed_over_and_replaced(base: Path, place: Path, name: str) -> None:
    path = base / "config.json"
    expected = sha256_file(path, QuickCache())
    (entry,) = entries(place)
    text = entry.read_text()
    bad = damaged(text)[name]
    entry.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    again = QuickCache()
    assert sha256_file(path, again) == expected
    assert again.reused == 0
    assert sha256_file(path, again) == expected
    assert again.reused == 1


def test_entries_with_a_right_check_and_wrong_content_are_passed_over(base: Path, place: Path) -> None:
    path = base / "config.json"
    expected = sha256_file(path, QuickCache())
    (entry,) = entries(place)
    value = json.loads(entry.read_text())
    del value["check"]
    for change in ({"sha256": "x"}, {"sha256": 3}, {"tensors": [1]}, {"tensors": {"a": 1}}, {"begun": "-"}):
        broken = value | change
        entry.write_text(json.dumps({**broken, "check": module._check(broken)}))
        again = QuickCache()
        assert sha256_file(path, again) == expected
        assert again.reused == 0


@pytest.mark.parametrize(
    "fault", ["group may write", "all may write", "link", "another's", "folder", "folder is a link"]
)
def test_a_foreign_entry_is_passed_over(
    base: Path, place: Path, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = base / "config.json"
    expected = sha256_file(path, QuickCache())
    (entry,) = entries(place)
    assert entry.stat().st_mode & 0o777 == 0o600
    assert place.stat().st_mode & 0o777 == 0o700
    if fault.endswith("may write"):
        entry.chmod(0o660 if "group" in fault else 0o606)
    elif fault == "link":
        entry.rename(tmp_path / "entry")
        entry.symlink_to(tmp_path / "entry")
    elif fault == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    elif fault == "folder":
        place.chmod(0o777)
    else:
        place.rename(tmp_path / "moved")
        place.symlink_to(tmp_path / "moved")
    again = QuickCache()
    assert sha256_file(path, again) == expected
    assert again.reused == 0


def test_a_cache_that_cannot_be_written_is_no_error(base: Path, place: Path) -> None:
    place.parent.write_text("in the way")
    for _ in range(2):
        again = QuickCache()
        assert hash_model(base, cache=again) == hash_model(base)
        assert again.reused == 0


def test_a_file_as_young_as_its_clock_s_tick_is_not_cached(
    base: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MARGIN", 2_000_000_000)
    hash_model(base, cache=QuickCache())
    assert not place.exists()


def test_old_entries_go_first(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 8)
    for number in range(20):
        path = base / f"{number}.txt"
        path.write_text(str(number))
        sha256_file(path, QuickCache())
    assert 8 <= len(entries(place)) <= 9
    assert QuickCache().find((base / "19.txt").stat()).sha256
    assert QuickCache().find((base / "0.txt").stat()) == Digests()


def test_digests_of_both_kinds_share_an_entry(base: Path, place: Path) -> None:
    path = base / "part-0.safetensors"
    cache = QuickCache()
    sha256_file(path, cache)
    _, tensors = hash_adapter(path, cache=cache)
    assert len(entries(place)) == 1
    assert cache.level is Level.BYTES
    found = cache.find(path.stat())
    assert found.sha256 == sha256_file(path)[1]
    assert found.tensors == {name: record.digest for name, record in tensors.items()}


def test_the_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("GORA_SERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gora-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gora-serve"


def test_verify_says_at_which_level(base: Path, tmp_path: Path) -> None:
    roots = hash_model(base).roots
    adapter = bound_adapter(tmp_path / "adapter", roots)
    record = read_record(json_metadata(adapter), adapter)
    seal_folder(adapter, {"adapter_root": record["adapter_root"], "binding": record["base"]})
    assert verify_adapter(adapter, base=base).to_json()["verified"] is True
    assert verify_adapter(adapter, base=base, cache=QuickCache()).level is Level.BYTES
    quick = verify_adapter(adapter, base=base, cache=QuickCache())
    told = quick.to_json()
    assert (told["verified"], told["level"], told["claim"]) == (False, "L0 stat", "trained")
    (tmp_path / "m.json").write_text(json.dumps(hash_model(base).to_json()))
    assert verify_base(base, tmp_path / "m.json").level is Level.BYTES
    assert verify_base(base, tmp_path / "m.json", cache=QuickCache()).level is Level.STAT
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1] + b"\x07")
    with pytest.raises(MismatchError, match="GS-102"):
        verify_adapter(adapter, base=base, cache=QuickCache())


def json_metadata(adapter: Path) -> dict[str, str]:
    from gora_serve.integrity.headers import read_header

    return dict(read_header(adapter / WEIGHTS).metadata)
