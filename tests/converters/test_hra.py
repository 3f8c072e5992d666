"""HRA: reflections of the base's weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import HRAConfig, get_peft_model
from proving import converted, load_on, logits_of, off_by, prove_exact, train
from tiny_models import build_llama


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 3}, {"r": 4, "apply_GS": True, "init_weights": False}])
@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed")
def test_hra_is_exact(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    config = HRAConfig(target_modules="all-linear", **settings)
    model = train(get_peft_model(build_llama(), config), steps=6, lr=5e-3)
    model.save_pretrained(tmp_path / "adapter")
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="hra")
    assert {module.full_rank for module in done.modules.values()} == {settings["r"]}


def test_the_order_of_the_reflections_counts(tmp_path: Path, tiny_base: Path) -> None:
    """They do not commute: with their order turned round the model is another."""
    from safetensors.torch import load_file, save_file

    model = train(get_peft_model(build_llama(), HRAConfig(target_modules="all-linear", r=4)), lr=2e-2)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.flip(1).contiguous() for name, tensor in load_file(file).items()}, file)
    converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="hra")
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), logits_of(model)) > 0.01
