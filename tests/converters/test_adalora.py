"""AdaLoRA: ranks that were pruned module by module, to 0 even."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from proving import converted, input_ids, logits_of, prove_exact
from tiny_models import build_llama

from gora_serve.errors import InputError


@pytest.mark.filterwarnings("ignore:Adapter .default.. .* LoRA tensor")
def test_adalora_is_exact(tmp_path: Path, tiny_base: Path) -> None:
    config = AdaLoraConfig(
        init_r=6, target_r=2, tinit=1, tfinal=2, total_step=10, lora_alpha=24, target_modules=["q_proj", "up_proj"]
    )
    model = get_peft_model(build_llama(), config)
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=5e-2)
    for step in range(1, 9):
        optimizer.zero_grad()
        model(input_ids=input_ids(), labels=input_ids()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path / "adapter")
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))
    assert done.detection.family == "adalora"
    assert len({module.rank for module in done.modules.values()}) > 1


def test_a_scale_that_is_not_known(tmp_path: Path, tiny_base: Path) -> None:
    config = AdaLoraConfig(init_r=2, total_step=5, target_modules=["q_proj"])
    get_peft_model(build_llama(), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_r"', '"once_r"'))
    with pytest.raises(InputError, match="GS-3113"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out")
