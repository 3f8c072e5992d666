"""Adapters that must not pass: a seal that disagrees with the file, a lost seal on another base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from layouts import save_base

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.format import write_adapter
from gora_serve.errors import BindingError, InputError, MismatchError
from gora_serve.integrity.binding import seal_folder, with_digest
from gora_serve.integrity.files import write_json
from gora_serve.integrity.headers import encode_header
from gora_serve.integrity.manifest import Manifest, hash_model
from gora_serve.integrity.record import binding_json
from gora_serve.integrity.verify import verify_adapter, verify_base, verify_unsealed

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def bound(tiny_base: Path, tmp_path: Path) -> Path:
    """An adapter folder bound to tiny_base, sealed."""
    base = BaseId("tiny", None, hash_model(tiny_base).roots)
    adapter = Adapter({PATH: LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 1.0)}, base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    root = write_adapter(folder, adapter, "native")
    seal_folder(folder, {"adapter_root": root, "binding": binding_json("tiny", None, base.roots)})
    return folder


@pytest.fixture
def other_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The same shapes, one byte of one weight changed."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return folder


def test_the_right_base_passes_and_the_twin_does_not(bound: Path, tiny_base: Path, other_base: Path) -> None:
    assert verify_adapter(bound, base=tiny_base).warnings == ()
    with pytest.raises(BindingError):
        verify_adapter(bound, base=other_base)


def test_without_its_seal_an_adapter_is_still_held_to_its_base(bound: Path, tiny_base: Path, other_base: Path) -> None:
    (bound / "gora_manifest.json").unlink()
    assert len(verify_unsealed(bound, base=tiny_base, base_manifest=hash_model(tiny_base)).warnings) == 1
    with pytest.raises(BindingError):
        verify_unsealed(bound, base=other_base, base_manifest=hash_model(other_base))


def test_a_seal_that_names_another_base_than_the_file_is_refused(bound: Path, tiny_base: Path) -> None:
    seal = bound / "gora_manifest.json"
    value = json.loads(seal.read_text())
    value["binding"]["weights_root"] = "gb1:sha256:" + "0" * 64
    write_json(seal, with_digest(value))
    with pytest.raises(MismatchError) as caught:
        verify_adapter(bound, base=tiny_base)
    assert caught.value.code == "GS-112"


def test_damage_is_told_by_file_tensor_and_chunk(tmp_path: Path) -> None:
    base, manifest = tmp_path / "base", tmp_path / "manifest.json"
    base.mkdir()
    sizes = {"a": 9 << 20, "b": 100}
    header = encode_header([(name, "U8", (size,)) for name, size in sizes.items()], {})
    weights = base / "model.safetensors"
    weights.write_bytes(header + bytes(sum(sizes.values())))
    (base / "config.json").write_text("{}")
    write_json(manifest, hash_model(base).to_json())
    for at, tensor, words in [
        (0, "a", "chunk 1 of 3 on: bytes 0 to 4194303 "),
        ((4 << 20) - 1, "a", "chunk 1 of 3 on: bytes 0 to 4194303 "),
        (4 << 20, "a", "chunk 2 of 3 on: bytes 4194304 to 8388607 "),
        ((9 << 20) - 1, "a", "chunk 3 of 3 on: bytes 8388608 to 9437183 "),
        (9 << 20, "b", "1 tensor differs from the manifest"),
    ]:
        data = bytearray(weights.read_bytes())
        data[len(header) + at] ^= 1
        weights.write_bytes(data)
        with pytest.raises(MismatchError, match="GS-113") as caught:
            verify_base(base, manifest)
        assert (caught.value.fields["file"], caught.value.fields["tensor"]) == (weights, tensor)
        assert words in str(caught.value)
        data[len(header) + at] ^= 1
        weights.write_bytes(data)
    verify_base(base, manifest)


def test_leaves_must_give_the_digest_of_their_tensor(tmp_path: Path) -> None:
    header = encode_header([("a", "U8", (5 << 20,))], {})
    (tmp_path / "model.safetensors").write_bytes(header + bytes(5 << 20))
    value = hash_model(tmp_path).to_json()
    assert Manifest.from_json(value).leaves.keys() == {"a"}
    without = {key: item for key, item in value.items() if key != "leaves"}
    assert Manifest.from_json(without).leaves == {}  # those of before had none
    for leaves in ([], ["0" * 64] * 2, ["x"], 1):
        with pytest.raises(InputError, match="GS-329"):
            Manifest.from_json({**value, "leaves": {"a": leaves}})


def test_a_head_that_differs_is_named_where_it_lies_in_a_file(tmp_path: Path) -> None:
    """Beside its embeddings, which differ too; one that only follows them is not."""
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"

    def model(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        folder = save_base(tmp_path / name, tensors)
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
        return folder

    norm = {"model.norm.weight": torch.ones(2)}
    value = hash_model(model("base", {embeddings: torch.ones(2, 2), **norm})).to_json()
    write_json(tmp_path / "m.json", value)
    write_json(tmp_path / "ring.json", {**value, "aliases": {head: embeddings, embeddings: embeddings}})
    other = {embeddings: torch.zeros(2, 2), **norm}
    for folder, manifest, what in (
        (model("tied", other), "m.json", f"1 tensor differs from the manifest: {embeddings} (changed)"),
        (model("stored", other | {head: torch.zeros(2, 2)}), "m.json",
         f"2 tensors differ from the manifest: {head} (changed), {embeddings} (changed)"),
        (model("none", norm), "ring.json", f"{embeddings} (missing)"),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match="GS-113") as caught:
            verify_base(folder, tmp_path / manifest)
        assert what in caught.value.what
