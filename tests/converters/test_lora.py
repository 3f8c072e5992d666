"""Plain LoRA: every way in which PEFT spells ranks and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from proving import logits_of, prove_exact, train
from tiny_models import build_llama


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    ],
)
def test_plain_lora(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    model = train(get_peft_model(build_llama(), config))
    model.save_pretrained(tmp_path / "adapter")
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))
    assert done.detection.family == "lora"
