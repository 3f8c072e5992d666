"""MiSS and Bone: the standard block, `mini` and `bat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import MissConfig, get_peft_model
from proving import EXACT, converted, load_on, logits_of, off_by, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from gora_serve.errors import BindingError, UsageError


def trained_miss(folder: Path, *, seed: int = 0, **settings: Any) -> Any:
    config = MissConfig(target_modules="all-linear", **settings)
    model = train(get_peft_model(build_llama(seed), config), steps=6, lr=5e-3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"r": 4}, 4), ({"r": 6}, 6), ({"r": 4, "init_weights": "mini", "mini_r": 8}, 4),
        ({"r": 3, "miss_dropout": 0.1}, 3),
    ],
)  # fmt: skip
def test_miss_is_exact(tmp_path: Path, tiny_base: Path, settings: dict[str, Any], rank: int) -> None:
    """r 6 and 3 do not divide the 32 and 64 inputs: PEFT pads with zeros."""
    model = trained_miss(tmp_path / "adapter", **settings)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="miss")
    assert {module.full_rank for module in done.modules.values()} == {rank}


def test_bat_has_full_rank(tmp_path: Path, tiny_base: Path) -> None:
    model = trained_miss(tmp_path / "adapter", r=4, init_weights="bat")
    with pytest.raises(UsageError, match="GS-231"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "refused", family="miss")
    assert not (tmp_path / "refused").exists()
    done = prove_exact(
        tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="miss", tolerance=0.0
    )
    assert max(module.full_rank for module in done.modules.values()) == 32


@pytest.mark.parametrize("settings", [{}, {"init_weights": "bat"}])
def test_bone_is_the_same(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    """PEFT no longer reads Bone; its own script turns one into the other by these two names."""
    model = trained_miss(tmp_path / "adapter", r=4, **settings)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "BONE"}))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("miss_", "bone_"): tensor for name, tensor in load_file(file).items()}, file)
    done = converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="miss", tolerance=0.0)
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), logits_of(model)) < EXACT
    assert done.reading.served is None


def test_another_base_is_refused(tmp_path: Path, tiny_gpt2: Path, tiny_base: Path) -> None:
    trained_miss(tmp_path / "adapter", r=4)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(BindingError, match="GS-452"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="miss")
    save_file(tensors, file)
    with pytest.raises(BindingError, match="GS-404"):
        converted(tmp_path / "adapter", tiny_gpt2, tmp_path / "out", family="miss")
