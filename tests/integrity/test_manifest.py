"""Tensor digests and roots against a naive computation; what keeps the root, what changes it, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gora_serve.errors import InputError, MachineError, MismatchError
from gora_serve.integrity import hashing
from gora_serve.integrity.hashing import SPAN
from gora_serve.integrity.headers import encode_header
from gora_serve.integrity.manifest import (
    Manifest,
    Roots,
    TensorRecord,
    config_root,
    differences,
    hash_adapter,
    hash_model,
    make_manifest,
    tensor_digest,
    tokenizer_root,
    weights_root,
)
from gora_serve.progress import Progress

MIB4 = 4 * 1024 * 1024
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
SLOW_DISK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def naive_digest(data: bytes) -> str:
    """The scheme, written a second time and in the plainest way."""
    leaves = [hashlib.sha256(b"\x00" + data[i : i + MIB4]).digest() for i in range(0, max(len(data), 1), MIB4)]
    return hashlib.sha256(b"\x01" + struct.pack("<Q", len(data)) + b"".join(leaves)).hexdigest()


def naive_root(tensors: Tensors) -> str:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL", torch.float16: "F16"}
    value = {
        name: {"dtype": names[t.dtype], "sha256": naive_digest(raw_bytes(t)), "shape": list(t.shape)}
        for name, t in sorted(tensors.items())
    }
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    return "gb1:sha256:" + hashlib.sha256(b"gora-serve/base-manifest/1\x00" + text).hexdigest()


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def model_tensors() -> Tensors:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(7, 4).bfloat16(),
        "model.layers.0.q.weight": torch.randn(4, 4),
        "model.layers.0.k.weight": torch.randn(4, 4),
        "model.layers.1.q.weight": torch.randn(5, 3).half(),
        "model.steps": torch.arange(3),
        "model.scalar": torch.tensor(2.5),
        "model.mask": torch.tensor([True, False]),
        "model.none": torch.zeros(0, 3),
    }


def save_model(folder: Path, tensors: Tensors, shards: list[list[str]] | None = None, **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if shards is None:
        save_file(tensors, folder / "model.safetensors", metadata)
        return folder
    placed = {}
    for i, names in enumerate(shards):
        file = f"model-{i:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata)
        placed |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize("size", [0, 1, 4095, MIB4 - 1, MIB4, MIB4 + 1, 2 * MIB4, 2 * MIB4 + 5])
def test_digest_is_the_scheme_whatever_the_buffers(size: int) -> None:
    data = random.Random(size).randbytes(size)
    expected = naive_digest(data)
    for step in (1 << 18, MIB4, 999_983, size or 1):
        assert tensor_digest(data[i : i + step] for i in range(0, size, step)) == expected
    assert tensor_digest([b"", memoryview(bytearray(data)), b""]) == expected


@given(st.lists(st.binary(max_size=9), max_size=5))
def test_digest_of_small_buffers(buffers: list[bytes]) -> None:
    assert tensor_digest(buffers) == naive_digest(b"".join(buffers))


def test_golden_values() -> None:
    # Made with printf and sha256sum. A change of any of these breaks every manifest in the world.
    assert tensor_digest([]) == "0b0162c42a602b3b1a8fd2be56fc336792b0c9ebe7609128ee03b491e12c5203"
    records = {"\ufb33": TensorRecord("F32", (), 4, "0" * 64), "\U0001f600": TensorRecord("BF16", (0, 2), 0, "1" * 64)}
    assert weights_root(records) == "gb1:sha256:687a7b85b7ba4ebf30a0b5c34d63f8167e5f36c9bcfa2826f246c7e7afae6b43"


def test_hash_model_agrees_with_the_naive_scheme_and_sha256sum(tmp_path: Path) -> None:
    tensors = model_tensors()
    tensors["model.large"] = torch.randn(3 * 1024, 1024)  # 12 MiB: three leaves
    folder = save_model(tmp_path / "m", tensors)
    (folder / "config.json").write_text("{}")
    events: list[Progress] = []
    manifest = make_manifest(folder, listen=events.append)
    assert manifest.roots == Roots(naive_root(tensors), config_root(folder), None)
    assert {name: item.digest for name, item in manifest.tensors.items()} == {
        name: naive_digest(raw_bytes(tensor)) for name, tensor in tensors.items()
    }
    listed = subprocess.run(
        ["sha256sum", *(item.path for item in manifest.files)], cwd=folder, capture_output=True, text=True, check=True
    )
    assert listed.stdout.splitlines() == [f"{item.sha256}  {item.path}" for item in manifest.files]
    assert [item.size for item in manifest.files] == [(folder / item.path).stat().st_size for item in manifest.files]
    assert events[-1].done == events[-1].total
    assert hash_adapter(folder / "model.safetensors") == (manifest.roots.weights, dict(manifest.tensors))
    assert hash_model(folder) == replace(manifest, files=())


@pytest.mark.parametrize("size", [0, 1, 2 * SPAN - 1, 2 * SPAN, 2 * SPAN + 1, 3 * SPAN + 5])
def test_a_tensor_that_several_threads_share(tmp_path: Path, size: int) -> None:
    data = {"a": b"", "large": random.Random(size).randbytes(size), "z": b"zz"}
    layout = [(name, "U8", (len(blob),)) for name, blob in data.items()]
    (tmp_path / "model.safetensors").write_bytes(encode_header(layout, {}) + b"".join(data.values()))
    found = hash_model(tmp_path)
    assert {name: item.digest for name, item in found.tensors.items()} == {
        name: naive_digest(blob) for name, blob in data.items()
    }
    assert list(found.leaves) == (["large"] if size > MIB4 else [])
    assert len(found.leaves.get("large", ())) == (-(-size // MIB4) if size > MIB4 else 0)


def test_only_a_stored_manifest_hashes_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m", model_tensors())
    expected = make_manifest(folder)

    def refuse(_: object) -> None:
        raise AssertionError("a file is hashed whole")

    monkeypatch.setattr(hashing, "_whole_file", refuse)
    assert hash_model(folder) == replace(expected, files=())
    with pytest.raises(AssertionError):
        make_manifest(folder)


@SLOW_DISK
@given(data=st.data())
def test_relayout_keeps_the_root(tmp_path: Path, data: st.DataObject) -> None:
    tensors = model_tensors()
    names = data.draw(st.permutations(sorted(tensors)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(names) - 1), max_size=4)))
    shards = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    save_model(folder, tensors, shards if data.draw(st.booleans()) else None, note=data.draw(st.text(max_size=5)))
    assert hash_model(folder).roots.weights == naive_root(tensors)


@SLOW_DISK
@given(data=st.data())
def test_every_flipped_bit_is_found_and_named(tmp_path: Path, data: st.DataObject) -> None:
    folder = save_model(tmp_path / "m", model_tensors())
    before = hash_model(folder)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    place = data.draw(st.integers(start, len(raw) - 1) | st.sampled_from([start, len(raw) - 1]))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    after = hash_model(folder)
    found = differences(before.tensors, after.tensors)
    old, new = load_file(path), model_tensors()
    changed = [name for name in new if raw_bytes(old[name]) != raw_bytes(new[name])]
    assert found.changed == tuple(changed)
    assert (found.missing, found.extra) == ((), ())
    assert after.roots.weights != before.roots.weights


def edit(tensors: Tensors, change: str) -> Tensors:
    q, k, none = "model.layers.0.q.weight", "model.layers.0.k.weight", "model.none"
    return {
        "swap": lambda: {**tensors, q: tensors[k], k: tensors[q]},
        "rename": lambda: {("x" if name == q else name): t for name, t in tensors.items()},
        "drop empty": lambda: {name: t for name, t in tensors.items() if name != none},
        "shape": lambda: {**tensors, q: tensors[q].reshape(2, 8)},
        "type": lambda: {**tensors, q: tensors[q].view(torch.int32)},
        "widen": lambda: {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"].float()},
        "minus zero": lambda: {**tensors, none: torch.tensor([-0.0])},
        "zero": lambda: {**tensors, none: torch.tensor([0.0])},
        "nan": lambda: {**tensors, none: torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)},
        "other nan": lambda: {**tensors, none: torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)},
        "nothing": lambda: tensors,
    }[change]()


def test_every_semantic_edit_gives_another_root(tmp_path: Path) -> None:
    changes = [
        "swap",
        "rename",
        "drop empty",
        "shape",
        "type",
        "widen",
        "minus zero",
        "zero",
        "nan",
        "other nan",
        "nothing",
    ]
    roots = set()
    for change in changes:
        folder = save_model(tmp_path / change, {n: t.clone() for n, t in edit(model_tensors(), change).items()})
        roots.add(hash_model(folder).roots.weights)
    assert len(roots) == len(changes)


def test_differences_sorts_into_three() -> None:
    one, two = TensorRecord("F32", (1,), 4, "0" * 64), TensorRecord("F32", (1,), 4, "1" * 64)
    found = differences({"a": one, "b": one, "d": one}, {"d": two, "c": one, "a": one})
    assert (found.changed, found.missing, found.extra) == (("d",), ("b",), ("c",))
    assert found
    assert not differences({"a": one}, {"a": one})


def test_tied_model_with_and_without_its_head(tmp_path: Path) -> None:
    tensors = model_tensors()
    bare = save_model(tmp_path / "bare", tensors)
    full = save_model(tmp_path / "full", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    for folder in (bare, full):
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    assert hash_model(bare).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert hash_model(full).aliases == {}
    assert not differences(hash_model(bare).resolved(), hash_model(full).resolved())


def test_manifest_round_trip(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", model_tensors())
    (folder / "config.json").write_text('{"tie_word_embeddings": true, "rope_theta": 1e4, "eps": 1e-5}')
    (folder / "tokenizer.json").write_text("{}")
    manifest = make_manifest(folder)
    value = json.loads(json.dumps(manifest.to_json()))
    assert Manifest.from_json({**value, "unknown": 1}) == manifest
    assert value["totals"] == {"tensors": 8, "bytes": 244, "params": 81}


@pytest.mark.parametrize(
    "key", ["weights_root", "config_root", "tokenizer_root", "tensors", "aliases", "files", "source"]
)
def test_manifest_lacking_a_key_is_refused(tmp_path: Path, key: str) -> None:
    value = hash_model(save_model(tmp_path / "m", model_tensors())).to_json()
    del value[key]
    with pytest.raises(InputError, match="GS-329"):
        Manifest.from_json(value)


def test_doctored_manifests_are_refused(tmp_path: Path) -> None:
    value = json.loads(json.dumps(hash_model(save_model(tmp_path / "m", model_tensors())).to_json()))
    for broken, code in [
        ([], "GS-330"),
        ({**value, "schema": "gora-serve/base-manifest/2"}, "GS-330"),
        ({**value, "weights_root": "gb1:sha256:" + "0" * 64}, "GS-331"),
        ({**value, "weights_root": None}, "GS-329"),
        ({**value, "tensors": {"a": {}}}, "GS-329"),
        ({**value, "tensors": {"a": {"dtype": "F32", "shape": [2], "nbytes": 4, "digest": "0" * 64}}}, "GS-329"),
        ({**value, "files": [{"path": "x", "size": -1, "sha256": "0" * 64}]}, "GS-329"),
        ({**value, "aliases": {"a": "nowhere"}}, "GS-329"),
    ]:
        with pytest.raises(InputError, match=code):
            Manifest.from_json(broken)


def test_config_root_ignores_how_it_was_saved(tmp_path: Path) -> None:
    def of(text: str) -> str | None:
        (tmp_path / "config.json").write_text(text)
        return config_root(tmp_path)

    same = of('{"a": 1e4, "b": [0.1], "torch_dtype": "float16", "_name_or_path": "x", "transformers_version": "4"}')
    assert same == of('{"b": [0.10], "dtype": "float32", "a": 10000}')
    assert (
        len({same, of('{"a": 10000, "b": [0.2]}'), of('{"a": 10001, "b": [0.1]}'), of('{"a": 36893488147419103232}')})
        == 4
    )
    with pytest.raises(InputError, match="GS-335"):
        of("[]")


def test_tokenizer_root_follows_the_template(tmp_path: Path) -> None:
    assert tokenizer_root(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    one = tokenizer_root(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert tokenizer_root(tmp_path) == one
    (tmp_path / "chat_template.jinja").write_text("x")
    assert tokenizer_root(tmp_path) != one


def test_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="GS-503"):
        hash_model(tmp_path / "none")
    with pytest.raises(InputError, match="GS-322"):
        hash_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="pass its base model"):
        hash_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match="GS-323"):
        hash_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "", ".", "a\\b", "link.safetensors", "loop"]
)
def test_index_values_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    save_file(model_tensors(), tmp_path / "x.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    (folder / "loop").symlink_to("loop")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model_tensors(), name)}))
    with pytest.raises(InputError, match="GS-325"):
        hash_model(folder)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    tensors = model_tensors()
    names = sorted(tensors)
    folder = save_model(tmp_path / "m", tensors, [names[:4], names[4:]])
    index = folder / INDEX
    placed = json.loads(index.read_text())["weight_map"]

    def refused(placed: object, code: str) -> None:
        index.write_text(json.dumps({"weight_map": placed}))
        with pytest.raises(InputError, match=code):
            hash_model(folder)

    refused({**placed, "ghost": placed[names[0]]}, "GS-326")
    refused({**placed, names[0]: placed[names[-1]]}, "GS-326")
    refused({name: file for name, file in placed.items() if name != names[0]}, "GS-327")
    refused({}, "GS-324")
    refused({"a": 1}, "GS-324")
    save_file({names[0]: tensors[names[0]]}, folder / "extra.safetensors")
    refused({**placed, names[0]: "extra.safetensors"}, "GS-328")
    index.write_text(json.dumps({"weight_map": {**placed, "x": "gone-1.safetensors", "y": "gone-2.safetensors"}}))
    with pytest.raises(MachineError, match=r"GS-504.*gone-1.safetensors, gone-2"):
        hash_model(folder)


def test_a_single_file_beside_the_index_of_another_model(tmp_path: Path) -> None:
    """transformers reads the one and vLLM the other: no root can be that of both."""
    folder = save_model(tmp_path / "m", model_tensors())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(InputError, match="GS-3290"):
        hash_model(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model_tensors(), "model.safetensors")}))
    assert hash_model(folder).roots.weights == naive_root(model_tensors())


def hub_snapshot(tmp_path: Path) -> Path:
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / ("0" * 40)
    save_file(model_tensors(), repo / "blobs" / "temporary")
    digest = hashlib.sha256((repo / "blobs" / "temporary").read_bytes()).hexdigest()
    (repo / "blobs" / "temporary").rename(repo / "blobs" / digest)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_hub_snapshot(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    assert hash_model(snapshot).roots.weights == naive_root(model_tensors())
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    with pytest.raises(MismatchError, match="GS-105"):
        hash_model(snapshot)


def test_a_read_only_model_can_be_hashed_and_is_left_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", model_tensors())
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    (folder / "model.safetensors").chmod(0o444)
    folder.chmod(0o555)
    hash_model(folder)
    folder.chmod(0o755)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


@pytest.mark.parametrize("how", ["write", "truncate"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, how: str) -> None:
    folder = save_model(tmp_path / "m", model_tensors())
    path = folder / "model.safetensors"

    def meddle(_: Progress) -> None:
        with path.open("r+b") as stream:
            if how == "truncate":
                stream.truncate(path.stat().st_size - 1)
            else:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\x07")

    with pytest.raises(MismatchError, match="GS-101"):
        hash_model(folder, listen=meddle)
