"""Faults 33 to 43: a base that is not the one it was, to the last bit, and one that must not become another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from catalogue.conftest import INDEX, SINGLE, Place
from gora_serve.integrity.binding import with_digest
from gora_serve.integrity.files import write_json
from gora_serve.integrity.headers import read_header

TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def sealed(place: Place, folder: Path) -> Path:
    """The manifest that `hash` writes, outside of the folder."""
    manifest = place.folder / f"{folder.name}.manifest.json"
    place.accepts("hash", folder, "--output", manifest)
    place.before = None
    return manifest


def of_all_types() -> Tensors:
    return {name: torch.ones(6).to(kind) for name, kind in TYPES.items()}


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("name", TYPES)
def test_one_flipped_bit(place: Place, name: str, end: str) -> None:
    """33: file and tensor are named, whatever the type."""
    folder = write(place.folder / "model", of_all_types())
    manifest, file = sealed(place, folder), folder / SINGLE
    header = read_header(file)
    found = header.entries[name]
    raw = bytearray(file.read_bytes())
    at = header.data_start + (found.begin if end == "first" else found.end - 1)
    raw[at] ^= 1
    file.write_bytes(raw)
    place.refuses(("verify", folder, "--manifest", manifest), 1, "GS-113", "1 tensor differs", file=file, tensor=name)


def test_the_chunk_of_a_flipped_bit(place: Place) -> None:
    """33: of a large tensor the 4 MiB are named."""
    folder = write(place.folder / "model", {"large": torch.zeros(9 << 20, dtype=torch.uint8)})
    manifest, file = sealed(place, folder), folder / SINGLE
    at = read_header(file).data_start + (5 << 20)
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(b"\x01")
    said = "chunk 2 of 3 on: bytes 4194304 to 8388607"
    place.refuses(("verify", folder, "--manifest", manifest), 1, "GS-113", said, file=file, tensor="large")


BITS: dict[str, Callable[[Tensors], None]] = {
    "34 minus zero": lambda tensors: tensors["z"].copy_(torch.tensor([-0.0, 0.0])),
    "35 another NaN": lambda tensors: tensors["n"].view(torch.int32).copy_(torch.tensor([0x7FC00001])),
    "36 swapped": lambda tensors: tensors.update(a=tensors["b"], b=tensors["a"]),
}


@pytest.mark.parametrize("change", BITS)
def test_values_that_compare_equal_or_sum_to_the_same(place: Place, change: str) -> None:
    nan = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    tensors = {"a": torch.ones(3), "b": torch.arange(3.0), "n": nan, "z": torch.zeros(2)}
    folder = write(place.folder / "model", tensors)
    manifest = sealed(place, folder)
    BITS[change](tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    named = {"34": "z", "35": "n", "36": "a"}[change[:2]]
    count = "2 tensors differ" if change[:2] == "36" else "1 tensor differs"
    words = ("verify", folder, "--manifest", manifest)
    place.refuses(words, 1, "GS-113", count, file=folder / SINGLE, tensor=named)


def test_the_same_weights_in_another_layout(place: Place) -> None:
    """37: other shards, other order, other file names, other metadata: proved."""
    manifest = sealed(place, place.base)
    tensors = {name: value for shard in sorted(place.base.glob("model-*")) for name, value in load_file(shard).items()}
    placed = {}
    for shard in place.base.glob("model-*"):
        shard.unlink()
    for number in range(3):
        names = sorted(tensors, reverse=True)[number::3]
        save_file({name: tensors[name] for name in names}, place.base / f"part-{number}.safetensors", {"note": "x"})
        placed |= dict.fromkeys(names, f"part-{number}.safetensors")
    (place.base / INDEX).write_text(json.dumps({"weight_map": placed}))
    place.accepts("verify", place.base, "--manifest", manifest)


@pytest.mark.parametrize("copy", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("original", [torch.bfloat16, torch.float16, torch.float32])
def test_a_copy_in_another_type(place: Place, original: torch.dtype, copy: torch.dtype) -> None:
    """38: other bytes are other weights; that the values are equal is said, where they are, and nowhere else."""
    tensors = {"a": torch.tensor([[1.0, -0.0, 2.0**-14], [0.5, float("inf"), -3.0]]), "b": torch.ones(300_000)}
    folder = write(place.folder / "model", {name: value.to(original) for name, value in tensors.items()})
    manifest = sealed(place, folder)
    words = ("verify", folder, "--manifest", manifest)
    save_file({name: value.to(copy) for name, value in tensors.items()}, folder / SINGLE, {"format": "pt"})
    if copy == original:
        place.accepts(*words)
        return
    kinds = {original, copy} == {torch.bfloat16, torch.float16}
    said = ("GS-113", "2 tensors differ") if kinds else ("GS-150", "all values are equal")
    place.refuses(words, 1, *said, file=folder / SINGLE, tensor="a")
    tensors["b"][-1] += 2.0**-7  # of which each type knows: the last value, after more than one reading
    save_file({name: value.to(copy) for name, value in tensors.items()}, folder / SINGLE, {"format": "pt"})
    place.before = None
    place.refuses(words, 1, "GS-113", "2 tensors differ", file=folder / SINGLE, tensor="a")


@pytest.mark.parametrize("first", ["with", "without"])
def test_a_tied_model_with_and_without_its_head(place: Place, first: str) -> None:
    """39."""
    embedding = torch.arange(12.0).reshape(4, 3)
    bare, head = {"model.embed_tokens.weight": embedding}, {"lm_head.weight": embedding.clone()}
    folders = {
        "with": write(place.folder / "with", bare | head, tie_word_embeddings=True),
        "without": write(place.folder / "without", bare, tie_word_embeddings=True),
    }
    manifest = sealed(place, folders.pop(first))
    place.accepts("verify", *folders.values(), "--manifest", manifest)


def test_a_base_that_is_edited_while_it_is_hashed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """41: while it is hashed; while fit runs is in training's tests."""
    from gora_serve.integrity import hashing as module

    file, real = sorted(place.base.glob("model-*"))[0], module.tensor_leaves
    whole = file.read_bytes()

    def editing(buffers: Any) -> Any:
        file.write_bytes(whole)  # the same bytes: the time tells
        return real(buffers)

    monkeypatch.setattr(module, "tensor_leaves", editing)
    place.refuses(("hash", place.base), 1, "GS-101", "changed while", "nothing writes to it", file=file)


def test_a_base_that_cannot_be_written(place: Place) -> None:
    """42: hashed and served as it is; a process without root's rights is in integrity's tests."""
    adapter = place.adapter()
    for path in place.base.iterdir():
        path.chmod(0o444)
    place.base.chmod(0o555)
    try:
        place.accepts("hash", place.base, "--json")
        place.accepts(*place.serve(adapter))
    finally:
        place.base.chmod(0o755)


@pytest.mark.parametrize("where", ["base", "base/out", "link", "link/out", "around"])
@pytest.mark.parametrize("command", ["convert", "bind", "merge", "merge --into adapter"])
def test_an_output_that_is_the_base_or_in_it(place: Place, command: str, where: str) -> None:
    """43: refused before anything is written, with --overwrite too. fit is in cli's tests."""
    (place.folder / "link").symlink_to(place.base)
    output = place.folder if where == "around" else place.folder / where
    name, *more = command.split()
    inputs = ("-a", place.adapter(), place.base) if name == "merge" else (place.adapter(), "--base", place.base)
    words = (name, *inputs, *more, "--output", output, "--overwrite")
    place.refuses(words, 2, "GS-252" if where == "link" else "GS-251", file=output)


def test_a_merge_into_a_hard_link_to_a_shard(place: Place) -> None:
    """43: a second name of one of the base's files is no folder to write a model into."""
    os.link(sorted(place.base.glob("model-*"))[0], place.folder / "second")
    words = ("merge", place.base, "-a", place.adapter(), "--output", place.folder / "second", "--overwrite")
    place.refuses(words, 2, None, "is a file")


@pytest.mark.parametrize("where", ["base", "base/out", "link/out", "input", "input/out", "around"])
@pytest.mark.parametrize("named", ["base", "org/name", "moved/away"])
def test_an_export_into_a_base_or_its_input(place: Place, where: str, named: str) -> None:
    """43: whatever the adapter calls its base."""
    adapter = place.adapter()
    place.accepts("bind", adapter, "--base", place.base, "--output", place.folder / "input")
    rename_base(place.folder / "input", str(place.base) if named == "base" else named)
    place.before = None
    (place.folder / "link").symlink_to(place.base)
    output = place.folder / where
    if where == "around":
        shutil.copytree(place.folder / "input", output)
        shutil.copytree(place.base, output / "base")
    words = ("export", place.folder / "input", "--output", output, "--overwrite")
    code = "GS-251" if where.startswith("input") or (named == "base" and where != "around") else "GS-256"
    place.refuses(words, 2, code, file=output)


def rename_base(adapter: Path, name: str) -> None:
    """As of an adapter whose base was given by that name, when it was made."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    seal = adapter / "gora_manifest.json"
    value = json.loads(seal.read_text())
    raw = config.read_bytes()
    value["files"]["adapter_config.json"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    write_json(seal, with_digest(value))


def test_a_hard_link_to_the_base(place: Place) -> None:
    """43: `hash --output` on a second name of a shard is refused: what lies there is no manifest."""
    shard = sorted(place.base.glob("model-*"))[0]
    second = place.folder / "second"
    os.link(shard, second)
    place.refuses(("hash", place.base, "--output", second, "--overwrite"), 2, "GS-259", file=second)
    assert second.samefile(shard)
