"""LoftQ and QPiSSA, their layout rebuilt with a plain 4-bit quantizer (PEFT's own asks for a GPU).

The result is as near to the trained model as low rank goes: what is missing is W0 - Q - P0 and nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inits import LINEAR, edit_config
from peft import LoraConfig, get_peft_model
from proving import converted, train
from tiny_models import build_llama
from torch import Tensor

from converters.reading import Inputs
from gora_serve.adapter.format import read_adapter
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, UsageError


def quantized(W: Tensor) -> Tensor:
    """4 bits, absmax in blocks of 32."""
    blocks = W.reshape(-1, 32)
    step = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / step).round() * step).reshape(W.shape)


def low_rank(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank]


def initialize(W: Tensor, method: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, A0, B0 as PEFT's loftq_init makes them (one iteration more, scale ignored), or as QPiSSA does."""
    if method == "loftq":
        B, A = low_rank(W - quantized(W), 4)
        Q = quantized(W - B @ A)
        B, A = low_rank(W - Q, 4)
        return Q, A, B
    B, A = low_rank(W, 4)
    return quantized(W - B @ A), A / scale**0.5, B / scale**0.5


def make(folder: Path, method: str) -> None:
    """Save the quantized base, the initial and the trained adapter, alpha / r = 2."""
    model, base = get_peft_model(build_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)), build_llama()
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            Q, A, B = initialize(module.base_layer.weight.data, method, 2.0)
            base.get_submodule(name).weight.data = Q.clone()
            module.base_layer.weight.data = Q
            module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = A, B
    base.save_pretrained(folder / "quantized")
    model.save_pretrained(folder / "initial")
    train(model, lr=1e-3).save_pretrained(folder / "adapter")


def inputs_of(folder: Path, way: str, method: str) -> Inputs:
    if way == "beside":
        shutil.copytree(folder / "initial", folder / f"{method}_init")
    return Inputs(
        init_adapter=folder / "initial" if way in ("init", "both") else None,
        mutated_base=folder / "quantized" if way in ("mutated", "both") else None,
    )


@pytest.mark.parametrize("way", ["init", "mutated", "both", "beside"])
@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_what_is_missing_is_the_full_rank_remainder(tmp_path: Path, tiny_base: Path, method: str, way: str) -> None:
    make(tmp_path, method)
    edit_config(tmp_path / "adapter", init_lora_weights=True if way == "beside" else method)
    settings: Any = {"inputs": inputs_of(tmp_path, way, method), "family": "loftq"}
    done = converted(tmp_path / "adapter", tiny_base, tmp_path / "out", **settings)
    base, trained_on = BaseWeights(tiny_base), BaseWeights(tmp_path / "quantized")
    written, served, initial = read_adapter(done.folder).modules, done.reading.served, done.reading.initial
    assert served is not None
    assert initial is not None
    for path, factors in served.items():
        difference = base.weight(path).double() - trained_on.weight(path).double()  # W0 - Q
        remainder = float((difference - initial[path].delta()).norm())
        missing = written[path].delta() - (factors.delta() - difference)
        assert float(missing.norm()) == pytest.approx(remainder, rel=1e-3)
        assert remainder < 0.9 * float(difference.norm())  # leaving P0 in would be worse
    assert any("full rank" in note for note in done.reading.notes)


def test_refused(tmp_path: Path, tiny_base: Path) -> None:
    make(tmp_path, "loftq")
    edit_config(tmp_path / "adapter", init_lora_weights="loftq")
    with pytest.raises(UsageError, match="cannot be computed again"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="loftq")
    make(tmp_path / "other", "pissa")
    inputs = Inputs(init_adapter=tmp_path / "other" / "initial", mutated_base=tmp_path / "quantized")
    with pytest.raises(BindingError, match="not what the mutated base lacks") as refused:
        converted(tmp_path / "other" / "adapter", tiny_base, tmp_path / "out", inputs=inputs, family="loftq")
    assert refused.value.code == "GS-432"
