"""Merges that must be refused, or said: what a type cannot hold, stale indexes, malformed configurations."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.combining import merge_adapters
from converters.convert import convert
from converters.gap import find_gap
from converters.merge_receipt import MergedModel
from converters.merging import merge_model, verify_merged
from converters.reading import Inputs
from gora_serve.cli.render_merge import model_summary
from gora_serve.config import GapConfig, MergeConfig
from gora_serve.errors import InputError, UsageError
from gora_serve.integrity.bases import Base

MODULE = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def plain_adapter(folder: Path, base: Path, *, size: float = 1.0, **config: Any) -> Path:
    """Write an adapter as another tool does."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight = next(load_file(path)[f"{MODULE}.weight"] for path in shards(base) if f"{MODULE}.weight" in load_file(path))
    rows, columns = weight.shape
    factors = {
        f"base_model.model.{MODULE}.lora_A.weight": torch.randn(2, columns, generator=generator),
        f"base_model.model.{MODULE}.lora_B.weight": torch.randn(rows, 2, generator=generator) * size,
    }
    save_file(factors, folder / "adapter_model.safetensors")
    value = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(value | config))
    return folder


def shards(base: Path) -> list[Path]:
    return sorted(base.glob("*.safetensors"))


def edit_tensors(base: Path, change: Any) -> None:
    for path in shards(base):
        tensors: dict[str, Tensor] = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def work(tmp_path: Path, tiny_base: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "base")
    plain_adapter(tmp_path / "adapter", tmp_path / "base")
    return tmp_path


def merge(work: Path, *, weight: float = 1.0, adapter: str = "adapter", **settings: Any) -> MergedModel:
    base = Base(str(work / "base"), work / "base", None)
    return merge_model([(work / adapter, weight)], base, work / "out", MergeConfig(**settings))


def test_a_number_of_the_base_that_the_type_cannot_hold_is_refused(work: Path) -> None:
    def raise_norm(tensors: dict[str, Tensor]) -> None:
        if NORM in tensors:
            tensors[NORM][0] = 1e5

    edit_tensors(work / "base", raise_norm)
    with pytest.raises(InputError, match="GS-3401") as raised:
        merge(work, dtype="float16")
    assert raised.value.fields["tensor"] == NORM
    assert not (work / "out").exists()
    merge(work, dtype="bfloat16")


@pytest.mark.parametrize("code", ["GS-326", "GS-327"])
def test_a_stale_index_is_refused(work: Path, code: str) -> None:
    if code == "GS-326":
        edit_tensors(work / "base", lambda tensors: tensors.pop(NORM, None))
    else:
        placed = json.loads((work / "base" / INDEX).read_text())["weight_map"]
        del placed[NORM]
        edit_json(work / "base" / INDEX, weight_map=placed)
    with pytest.raises(InputError, match=code):
        merge(work)
    assert not (work / "out").exists()


def test_a_merged_model_with_a_stale_index_is_not_verified(work: Path) -> None:
    merge(work)
    (work / "out" / "gora_manifest.json").unlink()
    placed = json.loads((work / "out" / INDEX).read_text())["weight_map"]
    del placed[NORM]
    edit_json(work / "out" / INDEX, weight_map=placed)
    with pytest.raises(InputError, match="GS-327"):
        verify_merged(work / "out", [(work / "adapter", 1.0)], Base(str(work / "base"), work / "base", None))


@pytest.mark.parametrize(
    ("key", "value"),
    [("architectures", "LlamaForCausalLM"), ("architectures", [7]), ("id2label", 7), ("tie_word_embeddings", "false")],
)
def test_a_malformed_value_in_the_configuration_is_refused(work: Path, key: str, value: object) -> None:
    edit_json(work / "base" / "config.json", **{key: value})
    with pytest.raises(InputError, match="GS-3402") as raised:
        merge(work)
    assert key in str(raised.value)
    assert raised.value.fields["file"] == work / "base" / "config.json"


@pytest.mark.parametrize("size", [1e-1, 1e-3])
def test_the_rounding_of_the_base_is_no_part_of_what_is_stored(work: Path, size: float) -> None:
    done = merge(work, weight=size, dtype="bfloat16")
    one = done.written.tallies[f"{MODULE}.weight"]
    rounded = {name: value for path in shards(work / "base") for name, value in load_file(path).items()}
    base = rounded[f"{MODULE}.weight"].double()
    written = {name: value for path in shards(work / "out") for name, value in load_file(path).items()}
    factors = load_file(work / "adapter" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{MODULE}.lora_{kind}.weight"].double() for kind in "AB")
    update = size * 2 * B @ A  # lora_alpha 4 over r 2
    held = ((written[f"{MODULE}.weight"].double() - base.bfloat16().double()) * update).sum() / (update**2).sum()
    assert one.held == pytest.approx(float(held), rel=1e-6)
    assert 0.5 < one.held < 1.5


@pytest.mark.parametrize(("weight", "dtype"), [(0.0, "auto"), (0.0, "bfloat16"), (1e-12, "bfloat16")])
def test_a_merge_that_changes_nothing_says_so(work: Path, weight: float, dtype: str) -> None:
    done = merge(work, weight=weight, dtype=dtype)
    assert [line for line in done.warnings if line.startswith("nothing changed: ")]
    assert done.receipt["warnings"] == list(done.warnings)
    assert "100.0% of the update is stored" not in "\n".join(model_summary(done).lines)
    assert done.receipt["totals"]["changed"] == 0
    assert abs(done.receipt["totals"]["held"]) <= 1


def test_an_edited_base_that_nobody_named_is_said(work: Path) -> None:
    shutil.copytree(work / "base", work / "edited")
    factors = load_file(work / "adapter" / "adapter_model.safetensors")

    def edit(tensors: dict[str, Tensor]) -> None:
        if f"{MODULE}.weight" in tensors:
            A, B = (factors[f"base_model.model.{MODULE}.lora_{kind}.weight"] for kind in "AB")
            tensors[f"{MODULE}.weight"] -= B @ A  # half of what the adapter adds: lora_alpha 4 over r 2

    edit_tensors(work / "edited", edit)
    edit_json(work / "adapter" / "adapter_config.json", base_model_name_or_path=str(work / "edited"))
    base = Base(str(work / "base"), work / "base", None)
    told = [
        merge(work).warnings,
        merge_adapters([(work / "adapter", 1.0)], base, work / "one", MergeConfig(into="adapter")).warnings,
        convert(work / "adapter", base, work / "converted").warnings,
        find_gap(work / "adapter", base, GapConfig(), Inputs()).warnings,
    ]
    for warnings in told:
        assert [line for line in warnings if f"names {work / 'edited'} as its base" in line and "--from lora" in line]
        assert not [line for line in warnings if "nothing proves which base" in line]


@pytest.mark.parametrize(("key", "value"), [("task_type", [1]), ("target_parameters", 7), ("target_parameters", [7])])
def test_a_malformed_value_of_the_adapter_is_refused(work: Path, key: str, value: object) -> None:
    edit_json(work / "adapter" / "adapter_config.json", **{key: value})
    with pytest.raises(InputError, match="GS-3128") as raised:
        merge(work)
    assert key in str(raised.value)


@pytest.mark.parametrize("into", ["model", "adapter"])
def test_an_output_that_is_not_utf_8_is_refused(work: Path, into: str) -> None:
    base, output = Base(str(work / "base"), work / "base", None), work / os.fsdecode(b"b\xff")
    write = merge_model if into == "model" else merge_adapters
    with pytest.raises(UsageError, match="GS-239"):
        write([(work / "adapter", 1.0)], base, output, MergeConfig(into=into))
    assert not output.exists()


@pytest.mark.parametrize("said", [["x"], 7, "abc"])
def test_odd_metadata_of_the_index_is_written_anew(work: Path, said: object) -> None:
    edit_json(work / "base" / INDEX, metadata=said)
    merge(work)
    assert list(json.loads((work / "out" / INDEX).read_text())["metadata"]) == ["total_size"]
