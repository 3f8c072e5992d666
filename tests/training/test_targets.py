"""What no target can name is told, and what PEFT refuses is refused before the work that comes first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build_bart, build_gpt2, build_llama, build_mixtral, build_t5
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from gora_serve.adapter.factors import LoraFactors
from gora_serve.config import DataConfig, ModelConfig, TrainConfig
from gora_serve.errors import UsageError
from gora_serve.progress import silent
from gora_serve.training import inject
from gora_serve.training.session import Session, open_session
from gora_serve.training.targets import find_targets, out_of_reach


@pytest.mark.parametrize("build", [build_llama, build_gpt2, build_t5, build_bart])
def test_dense_models_are_in_reach(build: Callable[[], Any]) -> None:
    assert out_of_reach(build()) == (0.0, [])


def test_fused_experts_are_out_of_reach() -> None:
    model = build_mixtral()
    experts = 4 * 3 * 32 * 64
    router = 4 * 32
    share, kinds = out_of_reach(model)
    assert share == pytest.approx((experts + router) / sum(p.numel() for p in model.parameters()))
    assert kinds == ["MixtralExperts", "MixtralTopKRouter"]


def opened(base: Path, data: Path, targets: str) -> Session:
    return open_session(
        str(base), str(data), model=ModelConfig(targets=targets), rows=DataConfig(max_length=64), train=TrainConfig(),
        listen=silent,
    )  # fmt: skip


@pytest.mark.parametrize(("targets", "told"), [("all-linear", 1), ("attention", 0)])
def test_all_linear_says_what_it_leaves_out(
    tmp_path: Path, tokenizer: Any, tiny_data: Path, caplog: pytest.LogCaptureFixture, targets: str, told: int
) -> None:
    build_mixtral().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        opened(tmp_path, tiny_data, targets)
    lines = [record.message for record in caplog.records if "get no adapter" in record.message]
    assert len(lines) == told
    assert all("MixtralExperts" in line and line[0].isdigit() for line in lines)


def build_mamba() -> nn.Module:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=384, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0)
    return MambaForCausalLM(config).requires_grad_(False).eval()


def test_targets_that_peft_refuses() -> None:
    """At once, and again where the layers are made."""
    model = build_mamba()
    modules = find_targets(model, "all-linear")
    inject.check_targets(model, find_targets(model, "in_proj,x_proj"))
    with pytest.raises(UsageError) as caught:
        inject.check_targets(model, modules)
    assert caught.value.code == "GS-210"
    assert "out_proj" in str(caught.value.fields["actual"])
    factors = {
        path: LoraFactors(torch.zeros(1, m.in_features), torch.zeros(m.out_features, 1), 1.0)  # type: ignore[arg-type]
        for path, m in modules.items()
    }
    with pytest.raises(UsageError) as caught:
        inject.attach(model, factors, task_type="CAUSAL_LM", fan_in_fan_out=False)
    assert caught.value.code == "GS-210"
