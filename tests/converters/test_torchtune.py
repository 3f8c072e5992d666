"""torchtune, rebuilt from its forward pass: alpha / r * lora_b(lora_a(x)), with RoPE on neighbors, but for Qwen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_llama import PlainLlama, random_factors
from proving import EXACT, converted, input_ids, load_on, logits_of, off_by, prove_exact
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_PATHS, build_llama, llama_shapes
from torch import Tensor

from converters.reading import Inputs
from gora_serve.errors import GoraError

RANK, ALPHA = 4, 10.0
PATHS = (*LLAMA_PATHS, "lm_head")
NAMES = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}  # fmt: skip


def tune_name(path: str) -> str:
    if path == "lm_head":
        return "output"
    layer, _, kind = path.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{NAMES[kind]}"


Factors = dict[str, tuple[Tensor, Tensor]]


def tune_factors() -> Factors:
    return random_factors(llama_shapes() | {"lm_head": (384, 32)}, dict.fromkeys(PATHS, RANK))


def write_tune(folder: Path, factors: Factors, more: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(more or {})
    for path, (down, up) in factors.items():
        tensors |= {f"{tune_name(path)}.lora_a.weight": down, f"{tune_name(path)}.lora_b.weight": up}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "output_proj", "w1"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def their_logits(base: Path, factors: Factors, *, neighbors: bool = True) -> Tensor:
    def update(path: str, x: Tensor) -> Tensor | float:
        if path not in factors:
            return 0.0
        down, up = (one.double() for one in factors[path])
        return ALPHA / RANK * (x @ down.T @ up.T)

    return PlainLlama(base, neighbors=neighbors).logits(input_ids(), update).float()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_names_scale_and_rows(tmp_path: Path, kv_heads: int) -> None:
    """With 4 heads for the queries and 1, 2 or 4 for the keys; with 4 every attention layer is square."""
    base, factors = tmp_path / "base", tune_factors()
    build_llama(num_key_value_heads=kv_heads).save_pretrained(base)
    for path in factors:
        if path.endswith(("k_proj", "v_proj")):
            down, up = factors[path]
            factors[path] = down, up.repeat(2, 1)[: 8 * kv_heads] + 0.01 * torch.arange(8 * kv_heads)[:, None]
    trained = their_logits(base, factors)
    done = prove_exact(write_tune(tmp_path / "tune", factors), base, tmp_path / "out", trained, family="torchtune")
    assert set(done.modules) == set(PATHS)


def test_the_pickle_beside_the_export(tmp_path: Path, tiny_base: Path) -> None:
    """adapter_model.pt holds torchtune's own names; the safetensors file beside it is another spelling of the same."""
    factors = tune_factors()
    adapter = write_tune(tmp_path / "tune", factors)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.pt")
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, adapter / "adapter_model.safetensors")
    trained = their_logits(tiny_base, factors)
    pickles = Inputs(pickles=True)
    done = prove_exact(adapter / "adapter_model.pt", tiny_base, tmp_path / "out", trained, inputs=pickles)
    assert done.detection.family == "torchtune"


def test_qwen_rotates_halves_already(tmp_path: Path, tiny_base: Path) -> None:
    """torchtune's Qwen has transformers' order of rows: permuting them, as its own export does, would be wrong."""
    factors = tune_factors()
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    adapter = write_tune(tmp_path / "tune", factors)
    converted(adapter, base, tmp_path / "llama", family="torchtune")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    converted(adapter, base, tmp_path / "qwen", family="torchtune")
    trained = their_logits(tiny_base, factors, neighbors=False)
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "qwen")), trained) < EXACT
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "llama")), trained) > 1000 * EXACT


@pytest.mark.parametrize(
    ("config", "more", "code"),
    [
        ({"lora_alpha": None}, {}, "GS-3182"),
        ({"r": 8}, {}, "GS-3103"),
        ({}, {"layers.0.attn.q_proj.magnitude": torch.ones(32)}, "GS-3172"),
        ({}, {"layers.7.attn.q_proj.lora_a.weight": torch.ones(4, 32)}, "GS-3171"),
        ({}, {"layers.0.attn.strange.lora_a.weight": torch.ones(4, 32)}, "GS-3104"),
    ],
)
def test_what_is_refused(tmp_path: Path, tiny_base: Path, config: Any, more: dict[str, Tensor], code: str) -> None:
    adapter = write_tune(tmp_path / "tune", tune_factors(), more, **config)
    with pytest.raises(GoraError) as caught:
        converted(adapter, tiny_base, tmp_path / "out", family="torchtune")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [5, True, "x", [1]])
def test_a_base_whose_text_model_is_no_object(tmp_path: Path, value: object) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"text_config": value}))
    with pytest.raises(GoraError) as caught:
        converted(write_tune(tmp_path / "adapter", tune_factors()), tmp_path / "base", tmp_path / "out")
    assert caught.value.code == "GS-3402"
