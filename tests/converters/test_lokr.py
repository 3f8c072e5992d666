"""LoKr: every way in which PEFT keeps the two sides of the product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from proving import logits_of, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from converters.lokr import read
from converters.reading import Inputs
from converters.source import open_source
from gora_serve.errors import InputError

# Settings, and the parts that down_proj (32, 64) then has.
SETTINGS: list[tuple[dict[str, Any], set[str]]] = [
    ({"r": 2, "alpha": 6}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    ({"r": 1, "alpha": 3, "decompose_both": True}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
    ({"r": 16, "alpha": 4}, {"lokr_w1", "lokr_w2"}),
    ({"r": 1, "decompose_both": True, "decompose_factor": 16}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}),
    ({"r": 2, "decompose_both": True, "decompose_factor": 2}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    (
        {"r": 16, "alpha": 4, "rank_pattern": {"down_proj": 32}, "alpha_pattern": {"0.mlp.gate_proj": 9}},
        {"lokr_w1", "lokr_w2"},
    ),
]


def trained_lokr(folder: Path, **settings: Any) -> Any:
    targets = ["q_proj", "k_proj", "gate_proj", "down_proj"]
    model = train(get_peft_model(build_llama(), LoKrConfig(target_modules=targets, **settings)), steps=10, lr=1e-2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("settings", "parts"), SETTINGS)
def test_lokr_is_exact(tmp_path: Path, tiny_base: Path, settings: dict[str, Any], parts: set[str]) -> None:
    model = trained_lokr(tmp_path / "adapter", **settings)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in names if "0.mlp.down_proj" in name} == parts
    prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="lokr")


def test_ranks_multiply(tmp_path: Path, tiny_base: Path) -> None:
    model = trained_lokr(tmp_path / "adapter", r=2)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="lokr")
    assert done.modules["model.layers.0.mlp.down_proj"].full_rank == 4 * 2  # w1 is (4, 8), w2 (8, 8) of rank 2


def test_convolutions_are_refused(tmp_path: Path) -> None:
    trained_lokr(tmp_path / "adapter", r=2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors)).rpartition(".")[0]
    save_file(tensors | {f"{name}.lokr_t2": torch.ones(2, 2, 3, 3)}, file)
    with pytest.raises(InputError, match="GS-3150"):
        read(open_source(tmp_path / "adapter"), Inputs())
