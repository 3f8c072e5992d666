"""Seals find every change of a folder; bindings refuse another base and name what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gora_serve.errors import BindingError, InputError, MachineError, MismatchError
from gora_serve.integrity.binding import check_binding, check_folder, seal_folder
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import Manifest, Roots, TensorRecord, weights_root


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.bin", "a.json", "sub/c"):
        (folder / name).write_bytes(name.encode() * 9)
    seal_folder(folder, {"adapter_root": "r", "training": {"seed": 1}})
    return folder


def test_seal_lists_every_file(sealed: Path) -> None:
    value = check_folder(sealed)
    assert value == json.loads((sealed / "gora_manifest.json").read_text())
    assert list(value) == ["schema", "files", "adapter_root", "training", "status", "seal"]
    expected = {name: sha256_file(sealed / name) for name in ("a.json", "b.bin", "sub/c")}
    files = value["files"]
    assert isinstance(files, dict)
    assert {name: (item["size"], item["sha256"]) for name, item in files.items()} == expected
    assert list(files) == sorted(files)


def test_sealing_twice_gives_the_same_bytes(sealed: Path) -> None:
    before = (sealed / "gora_manifest.json").read_bytes()
    seal_folder(sealed, {"adapter_root": "r", "training": {"seed": 1}})
    assert (sealed / "gora_manifest.json").read_bytes() == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.json", "b.bin", "sub/c"]), place=st.integers(0, 44), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(sealed: Path, name: str, place: int, bit: int) -> None:
    raw = (sealed / name).read_bytes()
    broken = bytearray(raw)
    broken[place % len(raw)] ^= 1 << bit
    (sealed / name).write_bytes(broken)
    with pytest.raises(MismatchError, match="GS-102") as caught:
        check_folder(sealed)
    assert caught.value.fields["file"] == sealed / name
    (sealed / name).write_bytes(raw)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_seal_is_found(sealed: Path, place: int, bit: int) -> None:
    """Whatever the bit makes of it: other values, other text, or no JSON at all."""
    seal = sealed / "gora_manifest.json"
    raw = seal.read_bytes()
    broken = bytearray(raw)
    broken[place % len(raw)] ^= 1 << bit
    seal.write_bytes(broken)
    with pytest.raises((MismatchError, InputError)):
        check_folder(sealed)
    seal.write_bytes(raw)
    check_folder(sealed)


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value["training"].update(seed=2),
        lambda value: value.pop("training"),
        lambda value: value.pop("seal"),
        lambda value: value.update(more=1),
        lambda value: value.update(value.pop("training") and {"training": {"seed": 1}}),  # in another order
    ],
)
def test_the_seal_states_the_digest_of_its_own_text(sealed: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    seal = sealed / "gora_manifest.json"
    value = json.loads(seal.read_text())
    own = value["seal"]
    text = json.dumps({key: one for key, one in value.items() if key != "seal"}, indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == own
    edit(value)
    seal.write_text(json.dumps(value, indent=2) + "\n")
    with pytest.raises(MismatchError, match="GS-116") as caught:
        check_folder(sealed)
    assert caught.value.fields["file"] == seal


def test_missing_extra_and_counted(sealed: Path) -> None:
    (sealed / ".gitattributes").write_text("added by the hub")
    check_folder(sealed)
    (sealed / "sub" / "extra").symlink_to("/")
    with pytest.raises(MismatchError, match="GS-104"):
        check_folder(sealed)
    (sealed / "sub" / "c").unlink()
    with pytest.raises(MismatchError, match=r"GS-103.*1 more"):
        check_folder(sealed)
    (sealed / "a.json").write_text("longer or shorter")
    with pytest.raises(MismatchError, match=r"GS-102.*2 more"):
        check_folder(sealed)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"schema": "gora-serve/output-manifest/2"}, "GS-330"),
        ({"status": "running"}, "GS-333"),
        ({"files": []}, "GS-333"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, "GS-333"),
        ({"files": {"a": {"size": 1}}}, "GS-333"),
    ],
)
def test_bad_seals_are_refused(sealed: Path, change: dict[str, object], code: str) -> None:
    path = sealed / "gora_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=code):
        check_folder(sealed)


def test_no_seal_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GS-332"):
        check_folder(tmp_path)
    with pytest.raises(MachineError, match="GS-503"):
        check_folder(tmp_path / "none")


def tensors(*changed: str) -> dict[str, TensorRecord]:
    return {f"t{i}": TensorRecord("F32", (1,), 4, ("1" if f"t{i}" in changed else "0") * 64) for i in range(9)}


def manifest(records: dict[str, TensorRecord], config: str | None = "c", tokenizer: str | None = "t") -> Manifest:
    return Manifest(Roots(weights_root(records), config, tokenizer), records)


def test_a_matching_base_gives_no_warning(tmp_path: Path) -> None:
    base = manifest(tensors())
    assert check_binding(base.roots, base, base=tmp_path, strict=True) == []


def test_other_weights_are_refused_with_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path))
    base, other = manifest(tensors()), manifest(tensors("t1", "t2", "t3", "t4", "t5", "t6"))
    with pytest.raises(BindingError, match=r"GS-401.*which tensors differ is not known here"):
        check_binding(other.roots, base, base=tmp_path)
    remember_manifest(Manifest(Roots(other.roots.weights), other.tensors))
    with pytest.raises(BindingError, match="GS-401") as caught:
        check_binding(other.roots, base, base=tmp_path)
    text = str(caught.value)
    assert base.roots.weights in text
    assert other.roots.weights in text
    assert "t5 (changed) and 1 more" in text
    assert "t6" not in text


@pytest.mark.parametrize(("config", "tokenizer", "count"), [("x", "t", 1), ("c", None, 1), ("x", "x", 2)])
def test_other_config_or_tokenizer_warns_or_is_refused(
    tmp_path: Path, config: str | None, tokenizer: str | None, count: int
) -> None:
    bound, base = manifest(tensors()).roots, manifest(tensors(), config, tokenizer)
    assert len(check_binding(bound, base, base=tmp_path)) == count
    with pytest.raises(BindingError, match="GS-402"):
        check_binding(bound, base, base=tmp_path, strict=True)
