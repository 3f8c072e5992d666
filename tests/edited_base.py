"""A tiny model trained with PEFT's PiSSA, and what its initialisation did to the base, read from the live model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.linalg import subtract
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.gap import Parts

RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Edited:
    """model: live and trained. adapter, initial, mutated: what was saved. stored, taken: factors, trained and initial.
    residual: W_res, (out, in), by module."""

    model: Any
    adapter: Path
    initial: Path
    mutated: Path
    stored: Mapping[str, LoraFactors]
    taken: Mapping[str, LoraFactors]
    residual: Mapping[str, Tensor]

    def parts(self, base: Path, **changes: Any) -> Parts:
        """What a reader of PiSSA would say of it."""
        exact = LazyModules(self.stored, lambda path: subtract(self.stored[path], self.taken[path]))
        return Parts(BaseWeights(base), **({"exact": exact, "served": self.stored, "initial": self.taken} | changes))


def train_pissa(
    folder: Path, base: Path, *, lr: float = 5e-3, steps: int = 4, targets: Any = "all-linear", **settings: Any
) -> Edited:
    """Train on random tokens. The base's dtype is that of its files."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="pissa", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    model.save_pretrained(folder / "initial")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }
    taken = _factors(layers)
    save_edited(folder / "mutated", base, layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = torch.randint(3, 96, (4, 16))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    residual = {path: _matrix(layer) for path, layer in layers.items()}
    return Edited(
        model.eval(), folder / "adapter", folder / "initial", folder / "mutated", _factors(layers), taken, residual
    )


def save_edited(folder: Path, base: Path, layers: Mapping[str, Any]) -> None:
    """Save the base as it is in the live model."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for path, layer in layers.items():
        fresh.get_submodule(path).weight.data = layer.base_layer.weight.detach().clone()
    fresh.save_pretrained(folder)


def called_plain(adapter: Path) -> Path:
    """Say in the configuration that this is plain LoRA, as users are told to: engines then load it as it is."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
    return adapter


def _matrix(layer: Any) -> Tensor:
    weight: Tensor = layer.base_layer.weight.detach()
    return weight.T if type(layer.base_layer).__name__ == "Conv1D" else weight


def _factors(layers: Mapping[str, Any]) -> dict[str, LoraFactors]:
    return {
        path: LoraFactors(
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
            layer.scaling["default"],
        )
        for path, layer in layers.items()
    }
