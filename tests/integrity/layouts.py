"""Small bases in many layouts, and adapters bound to them, for the tests of this folder. No model is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from gora_serve.integrity.canonical import canonical_json
from gora_serve.integrity.manifest import Roots, hash_adapter
from gora_serve.integrity.record import RECORD_SCHEMA, WEIGHTS, binding_json

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
Q, K, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.norm"


def base_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": draw(9, 4).bfloat16(),
        f"{Q}.weight": draw(4, 4).bfloat16(),
        f"{K}.weight": draw(4, 4).half(),
        "model.layers.1.self_attn.q_proj.weight": draw(4, 4),
        "model.layers.1.self_attn.k_proj.weight": draw(4, 4),
        "model.steps": torch.arange(3),
        "model.mask": torch.tensor([True, False]),
        f"{NORM}.weight": torch.tensor([0.0, 1.0, -2.0, 3.0]),
    }


def save_base(
    folder: Path, tensors: Tensors, shards: list[list[str]] | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a model folder: one file, or the shards that are named."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards is None:
        save_file(tensors, folder / "model.safetensors", dict(metadata or {}))
        return folder
    placed = {}
    for number, names in enumerate(shards):
        save_file({name: tensors[name] for name in names}, folder / f"part-{number}.safetensors", dict(metadata or {}))
        placed |= dict.fromkeys(names, f"part-{number}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    return folder


def save_adapter(folder: Path, modules: tuple[str, ...] = (Q,), metadata: Mapping[str, str] | None = None) -> Path:
    """Write LoRA factors as another tool does, with a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {}
    for path in modules:
        factors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, 4)
        factors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(4, 2)
    save_file(factors, folder / WEIGHTS, dict(metadata or {}))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def bound_adapter(folder: Path, roots: Roots, name: str = "nowhere", modules: tuple[str, ...] = (Q,)) -> Path:
    """Write an adapter whose file names its base, as ours do; without a seal."""
    save_adapter(folder, modules)
    root, _ = hash_adapter(folder / WEIGHTS)
    binding = binding_json(name, None, roots)
    record = {"schema": RECORD_SCHEMA, "adapter_root": root, "base": binding, "origin": {}, "tool": "test"}
    return save_adapter(folder, modules, {"gora_serve": canonical_json(record).decode()})


Change = Callable[[Tensors], Tensors]


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def one_ulp(place: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The next number away from zero, at one place: the smallest change that there is."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        bits = tensor.clone().view(integers).flatten()
        bits[place] += 1
        return bits.view(tensor.dtype).reshape(tensor.shape)

    return change
