"""That two types hold the same values is told by the casts of torch and numpy, over every bit pattern."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import bound_adapter
from safetensors.torch import save_file

from gora_serve.errors import BindingError
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import Manifest, hash_model
from gora_serve.integrity.values import only_types_differ
from gora_serve.integrity.verify import verify_unsealed

EVERY = torch.arange(1 << 16).to(torch.uint16).view(torch.int16)  # all bits of 16


def save(folder: Path, **tensors: torch.Tensor) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_file(tensors, folder / "model.safetensors")
    return hash_model(folder)


def every(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """All values, and the same in F32: of F16 by numpy, as torch changes the bits of NaN; of BF16 all quiet ones."""
    values = EVERY.view(dtype)
    if dtype == torch.float16:
        return values, torch.from_numpy(values.numpy().astype(np.float32))
    quiet = values[~values.isnan() | ((EVERY & 64) != 0)].clone()
    return quiet, quiet.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_both_ways(tmp_path: Path, dtype: torch.dtype) -> None:
    values, same = every(dtype)
    narrow, wide = save(tmp_path / "narrow", a=values), save(tmp_path / "wide", a=same)
    assert only_types_differ(tmp_path / "wide", narrow.tensors, wide)
    assert only_types_differ(tmp_path / "narrow", wide.tensors, narrow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 1, 10_000, -1])
def test_one_value_that_differs(tmp_path: Path, dtype: torch.dtype, place: int) -> None:
    values, same = (tensor[: 1 << 14].clone() for tensor in every(dtype))
    narrow = save(tmp_path / "narrow", a=values)
    for change in (1, 1 << 13, 1 << 16, -(1 << 31)):  # below both types, one of F16, one of BF16, the sign
        wide = same.clone()
        wide.view(torch.int32)[place] ^= change
        assert not only_types_differ(tmp_path / "wide", narrow.tensors, save(tmp_path / "wide", a=wide))
        assert not only_types_differ(tmp_path / "narrow", hash_model(tmp_path / "wide").tensors, narrow)


def test_what_is_not_only_the_type(tmp_path: Path) -> None:
    ones = torch.ones(2, 3, dtype=torch.bfloat16)
    expected = save(tmp_path / "expected", a=ones, b=ones.float()).tensors
    changes = {
        "nothing": {"a": ones, "b": ones.float()},
        "shape": {"a": ones.float().reshape(3, 2), "b": ones.float()},
        "missing": {"a": ones.float()},
        "extra": {"a": ones.float(), "b": ones.float(), "c": ones},
        "another value too": {"a": ones.float(), "b": 2 * ones.float()},
        "a type that is not compared": {"a": ones.double(), "b": ones.float()},
    }
    for name, tensors in changes.items():
        actual = save(tmp_path / name.replace(" ", "-"), **tensors)
        assert not only_types_differ(tmp_path / name.replace(" ", "-"), expected, actual), name
    assert only_types_differ(tmp_path / "same", expected, save(tmp_path / "same", a=ones.float(), b=ones.float()))


def test_a_tied_head(tmp_path: Path) -> None:
    name, rows = "model.embed_tokens.weight", torch.arange(6.0).reshape(3, 2)
    full = save(tmp_path / "full", **{name: rows.bfloat16(), "lm_head.weight": rows.bfloat16().clone()})
    bare = save(tmp_path / "bare", **{name: rows})
    assert bare.aliases
    assert only_types_differ(tmp_path / "bare", full.resolved(), bare)
    assert only_types_differ(tmp_path / "bare", save(tmp_path / "b", **{name: rows.bfloat16()}).tensors, bare)


def test_an_adapter_of_the_base_in_its_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    weight = {"model.layers.0.q_proj.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    base = save(tmp_path / "base", **weight)
    remember_manifest(base)
    adapter = bound_adapter(tmp_path / "adapter", base.roots, "base")
    (adapter / "gora_manifest.json").unlink(missing_ok=True)
    wide = save(tmp_path / "wide", **{name: value.float() for name, value in weight.items()})
    with pytest.raises(BindingError, match=r"GS-401.*all values are equal"):
        verify_unsealed(adapter, base=tmp_path / "wide", base_manifest=wide)
    other = save(tmp_path / "other", **{name: 2 * value.float() for name, value in weight.items()})
    with pytest.raises(BindingError, match="GS-401") as caught:
        verify_unsealed(adapter, base=tmp_path / "other", base_manifest=other)
    assert "all values" not in str(caught.value)
