"""What verify says of merges by others: right ones pass, whatever the type; wrong ones are named, however small.

The right ones are PEFT's; the wrong ones are right ones that were spoiled.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, LoraConfig, MissConfig, PeftModel, get_peft_model
from proving import input_ids, merged, train
from safetensors.torch import save_file
from test_merging import judge, make, spoiled, theirs
from tiny_models import build_gpt2, build_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gora_serve.deploy.replay import Held

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings, tied heads and fan_in_fan_out
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def merge(folder: Path, **settings: Any) -> Path:
    """Merge; without the manifest, which would tell by itself what is spoiled."""
    merged(folder / "adapter", folder / "base", folder / "out", **settings)
    (folder / "out" / "gora_manifest.json").unlink()
    return folder / "out"


def noise(shape: torch.Size, size: float) -> Tensor:
    """Numbers of this size, of either sign."""
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(5)).sign()


def test_float16_is_held_to_its_own_steps(tmp_path: Path) -> None:
    """Which reach far below its smallest normal number, 6e-5."""
    make(tmp_path, lambda: build_llama().half(), target_modules=["q_proj"])
    merge(tmp_path)
    names = (Q_PROJ, "model.layers.0.mlp.up_proj.weight")
    for name in names:
        spoiled(tmp_path / "out", name, lambda t: (t.float() + noise(t.shape, 5.5e-5)).half())
    assert {one.name for one in judge(tmp_path, tmp_path / "out").of("differs")} == set(names)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_taken_whole_is_the_same_to_the_bit(tmp_path: Path, name: str) -> None:
    """A head and a norm of the adapter's, and embeddings that are the base's, rounded to another type."""
    make(tmp_path, build_llama, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    merge(tmp_path, dtype="bfloat16")
    assert judge(tmp_path, tmp_path / "out").verdict == "exact"
    spoiled(tmp_path / "out", name, lambda t: (t.view(torch.int16) + 1).view(torch.bfloat16))
    assert [one.name for one in judge(tmp_path, tmp_path / "out").of("differs")] == [name]


def test_a_tie_that_is_broken_is_told(tmp_path: Path) -> None:
    make(tmp_path, partial(build_llama, tie_word_embeddings=True), target_modules=["q_proj"])
    config = merge(tmp_path) / "config.json"
    assert judge(tmp_path, tmp_path / "out").verdict == "exact"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    found = judge(tmp_path, tmp_path / "out").of("differs")
    assert [one.name for one in found] == ["lm_head.weight"]
    assert "does not tie" in found[0].reason


def test_a_classifier_by_peft_needs_no_head(tmp_path: Path) -> None:
    """PEFT leaves out the head that makes tokens; it is needed where no classifier is in its place."""
    build_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS"))
    train(model, input_ids=input_ids(), labels=torch.tensor([0, 1, 2, 0]))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    found = judge(tmp_path, tmp_path / "theirs")
    assert found.verdict == "rounded", [(one.name, one.reason) for one in found.of("differs")]
    model = get_peft_model(build_llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    found = judge(tmp_path, tmp_path / "theirs").of("differs")
    assert [one.name for one in found if one.why] == ["lm_head.weight", "score.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_of_a_conv1d_by_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    make(tmp_path, lambda: build_gpt2().to(dtype), target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True,
         use_dora=True)  # fmt: skip
    found = judge(tmp_path, theirs(tmp_path, build_gpt2, dtype))
    assert found.verdict == "rounded", [(one.name, one.reason) for one in found.of("differs")]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_a_small_update_of_dora_must_be_there_in_sum(tmp_path: Path, weight: float) -> None:
    """Below the steps of the type, whatever the element: DoRA's lengths are rounded, but not all to one side."""
    name = "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(1)
    model = build_llama(hidden_size=128, intermediate_size=256).bfloat16()
    model.save_pretrained(tmp_path / "base")
    for module in ("0", "1"):
        key = f"model.layers.{module}.mlp.up_proj.weight"
        spoiled(tmp_path / "base", key, lambda t: t.sign() * (0.02 + 0.02 * torch.rand(t.shape)).to(t.dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["up_proj"], use_dora=True))
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.0045
    model.save_pretrained(tmp_path / "adapter")
    if weight:
        merge(tmp_path, weight=weight)
    found = judge(tmp_path, tmp_path / ("out" if weight else "base"))
    assert f"{name}.weight" in [one.name for one in found.of("differs")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [HRAConfig(r=4, target_modules=["up_proj"]),
                                    MissConfig(r=4, init_weights="bat", target_modules=["up_proj"])])  # fmt: skip
def test_families_that_multiply_the_weight(tmp_path: Path, config: Any, dtype: torch.dtype) -> None:
    """PEFT multiplies in the type of the weight: what is added up there is more than the update."""
    build_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")
    model = get_peft_model(build_llama(hidden_size=128, intermediate_size=256), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in (one for one in model.parameters() if one.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    found = judge(tmp_path, tmp_path / "theirs")
    assert found.verdict == "rounded", [(one.name, one.reason) for one in found.of("differs")]


def test_what_rounding_leaves_is_said() -> None:
    """An update that is there 1.00 times is one too many where rounding takes a part of it away."""
    held = Held("w", elements=10**6, equal=0, squared_update=1.0, ours=0.7, theirs=1.0, size=1.0, eps=2**-7)
    assert held.verdict == "differs"
    assert "1.00 times, and rounding leaves 0.70" in held.reason


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_sign_of_a_zero_is_a_bit(tmp_path: Path, dtype: str) -> None:
    """In a tensor that gets an update, and in one that is the base's, rounded to another type or not."""
    names = (Q_PROJ, "model.layers.0.mlp.gate_proj.weight")

    def build() -> Any:
        model = build_llama()
        for name in names:
            model.get_parameter(name).data[:2] = 0.0
            model.get_parameter(name).data[1] = -0.0
        return model

    make(tmp_path, build, target_modules=["q_proj"])
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    spoiled(tmp_path / "adapter", factor, lambda t: torch.cat([torch.zeros_like(t[:2]), t[2:]]))
    merge(tmp_path, dtype=dtype)
    assert judge(tmp_path, tmp_path / "out").verdict == "exact"
    for name in names:
        spoiled(tmp_path / "out", name, lambda t: torch.where(t == 0, -t, t))
    found = judge(tmp_path, tmp_path / "out")
    assert {one.name for one in (*found.of("rounded"), *found.of("differs"))} == set(names)


def test_numbers_of_4_bits_are_compared(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.blocks"
    make(tmp_path, build_llama, target_modules=["q_proj"])
    shutil.rmtree(tmp_path / "base")
    build_llama().save_pretrained(tmp_path / "base")  # in one file
    pairs = torch.arange(32, dtype=torch.uint8).view(4, 8).view(torch.float4_e2m1fn_x2)
    save_file({**build_llama().state_dict(), name: pairs}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    merge(tmp_path)
    found = judge(tmp_path, tmp_path / "out")
    assert (found.verdict, found.tensors[name].elements, found.tensors[name].equal) == ("exact", 64, 64)

    def last_bit(tensor: Tensor) -> Tensor:
        raw = tensor.view(torch.uint8)
        raw[-1, -1] ^= 0x80
        return raw.view(tensor.dtype)

    spoiled(tmp_path / "out", name, last_bit)
    assert [one.name for one in judge(tmp_path, tmp_path / "out").of("differs")] == [name]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32])
def test_integers_in_another_type_differ(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.table"

    def build() -> Any:
        model = build_llama()
        model.model.layers[0].self_attn.register_buffer("table", torch.arange(4))
        return model

    make(tmp_path, build, target_modules=["q_proj"])
    merge(tmp_path)
    assert judge(tmp_path, tmp_path / "out").tensors[name].verdict == "exact"
    spoiled(tmp_path / "out", name, lambda t: t.to(dtype))
    assert "should be I64" in judge(tmp_path, tmp_path / "out").tensors[name].reason
