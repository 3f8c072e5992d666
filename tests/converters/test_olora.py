"""OLoRA: computed again from W0, the transposed case of Conv1D, wrong initial adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inits import PATTERNS, WAYS, inputs_of, make_run, prove_exact_as
from proving import converted, load_on, logits_of, off_by
from tiny_models import build_gpt2, build_llama

from converters.reading import Inputs
from gora_serve.errors import BindingError


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{}, PATTERNS])
def test_olora(tmp_path: Path, tiny_base: Path, settings: dict[str, Any], way: str) -> None:
    run = make_run(tmp_path, "olora", **settings)
    prove_exact_as(run, tiny_base, tmp_path, "olora", inputs_of(run, way))
    converted(run.adapter, tiny_base, tmp_path / "wrong", family="lora")
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "wrong")), run.trained) > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_conv1d_loses_the_transpose(tmp_path: Path, tiny_gpt2: Path, way: str) -> None:
    """PEFT decomposes (in, out) as if it were (out, in); only square layers run at all."""
    run = make_run(tmp_path, "olora", build=build_gpt2, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    prove_exact_as(run, tiny_gpt2, tmp_path, "olora", inputs_of(run, way))


def test_bfloat16(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_llama().to(torch.bfloat16).save_pretrained(base)
    run = make_run(tmp_path, "olora", dtype=torch.bfloat16)
    for way in WAYS:
        done = converted(run.adapter, base, tmp_path / f"out-{way}", inputs=inputs_of(run, way), family="olora")
        assert done.error < 1e-6


def test_an_initial_adapter_of_another_base(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "olora", build=lambda: build_llama(seed=1))
    with pytest.raises(BindingError, match="QR decomposition of this base") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(init_adapter=run.initial), family="olora")
    assert refused.value.code == "GS-433"
