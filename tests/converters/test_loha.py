"""LoHa: the product of two low-rank matrices is low-rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from proving import converted, logits_of, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from converters.loha import read
from converters.reading import Inputs
from converters.source import open_source
from gora_serve.errors import InputError

SETTINGS: list[dict[str, Any]] = [
    {"r": 3, "alpha": 6},
    {"r": 2, "alpha": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.mlp.down_proj": 2}},
    {"r": 9, "alpha": 4, "rank_dropout": 0.1, "module_dropout": 0.1},  # r squared is more than the modules have
]


def trained_loha(folder: Path, **settings: Any) -> Any:
    targets = ["q_proj", "k_proj", "gate_proj", "down_proj"]
    model = train(get_peft_model(build_llama(), LoHaConfig(target_modules=targets, **settings)), steps=12, lr=2e-2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("settings", SETTINGS)
def test_loha_is_exact(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    model = trained_loha(tmp_path / "adapter", **settings)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="loha")
    ranks = {path: module.full_rank for path, module in done.modules.items()}
    rank = settings["r"] ** 2
    assert ranks["model.layers.0.mlp.down_proj"] == min(rank, 32)
    if "rank_pattern" in settings:
        assert ranks["model.layers.1.self_attn.q_proj"] == 9


def test_truncated_error_is_the_true_one(tmp_path: Path, tiny_base: Path) -> None:
    model = trained_loha(tmp_path / "adapter", r=4)
    done = converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="loha", rank=4)
    path = "model.layers.0.mlp.gate_proj"
    exact = model.base_model.model.model.layers[0].mlp.gate_proj.get_delta_weight("default").detach().double()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
    assert done.modules[path].error == pytest.approx(float((exact - B @ A).norm()), rel=1e-4)
    assert 0.01 < done.error < 1


def test_convolutions_are_refused(tmp_path: Path) -> None:
    trained_loha(tmp_path / "adapter", r=2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors)).rpartition(".")[0]
    save_file(tensors | {f"{name}.hada_t1": torch.ones(2, 2, 3, 3), f"{name}.hada_t2": torch.ones(2, 2, 3, 3)}, file)
    with pytest.raises(InputError, match="GS-3150"):
        read(open_source(tmp_path / "adapter"), Inputs())
