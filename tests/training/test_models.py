"""Bases that must not be taken as they are: holes, a stray adapter, float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_llama, build_t5
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from gora_serve.config import ModelConfig, Offload
from gora_serve.errors import InputError, MachineError, UsageError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.training.models import check_causal, load_model, load_tokenizer, vocabulary


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_a_base_with_a_hole_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    build_llama().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_model(Base("base", folder), ModelConfig())
    assert caught.value.code == "GS-349"
    assert caught.value.fields["tensor"] == "model.layers.1.mlp.down_proj.weight"


def edit(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("changes", "count", "tensor", "expected", "actual"),
    [
        ({"vocab_size": 100}, 2, "lm_head.weight", (100, 32), (384, 32)),
        ({"num_key_value_heads": 4}, 4, "model.layers.0.self_attn.k_proj.weight", (32, 32), (16, 32)),
    ],
)
def test_weights_of_other_shapes_are_refused_by_name(
    base: Path, changes: dict[str, int], count: int, tensor: str, expected: tuple[int, int], actual: tuple[int, int]
) -> None:
    edit(base / "config.json", changes)
    with pytest.raises(InputError, match="GS-349") as caught:
        load_model(Base("base", base), ModelConfig())
    fields = caught.value.fields
    assert f"{count} tensors" in caught.value.what
    assert (fields["tensor"], fields["expected"], fields["actual"]) == (tensor, expected, actual)


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": "two"}, {"rope_parameters": 5}, {"num_attention_heads": 0}, {"num_key_value_heads": 0},
     {"hidden_size": -8}, {"dtype": 5}, {"layer_types": 5}, {"pad_token_id": 999}, {"hidden_act": "none"}],
    ids=str,
)  # fmt: skip
def test_a_value_that_makes_no_model_is_refused(base: Path, changes: dict[str, Any]) -> None:
    edit(base / "config.json", changes)
    with pytest.raises(InputError, match="GS-367"):
        load_model(Base("base", base), ModelConfig())


def test_a_model_that_memory_cannot_hold_is_told_of(base: Path) -> None:
    edit(base / "config.json", {"vocab_size": 2**46})
    with pytest.raises(MachineError, match="GS-526"):
        load_model(Base("base", base), ModelConfig())


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"eos_token": 5}'), ("tokenizer.json", "[]")],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(base: Path, file: str, text: str) -> None:
    load_tokenizer(Base("base", base))
    (base / file).write_text(text)
    with pytest.raises(InputError, match="GS-368"):
        load_tokenizer(Base("base", base))


def test_a_tokenizer_of_an_unknown_kind_is_refused(base: Path) -> None:
    edit(base / "tokenizer.json", {"model": {"type": "none"}})
    with pytest.raises(InputError, match="GS-368"):
        load_tokenizer(Base("base", base))


def test_an_adapter_beside_the_weights_is_refused(base: Path) -> None:
    """transformers would load it on top of the weights that were hashed."""
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError) as caught:
        locate_base(str(base))
    assert caught.value.code == "GS-348"


def test_a_base_in_float16_is_refused_and_loads_in_another_type(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    build_llama().half().save_pretrained(folder)
    with pytest.raises(UsageError) as caught:
        load_model(Base("base", folder), ModelConfig())
    assert caught.value.code == "GS-207"
    model = load_model(Base("base", folder), ModelConfig(dtype="float32"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def bert(*, is_decoder: bool) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        is_decoder=is_decoder,
    )  # fmt: skip
    return BertLMHeadModel(config) if is_decoder else BertForMaskedLM(config)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_model_that_sees_what_it_predicts_is_refused(tmp_path: Path, offload: Offload) -> None:
    """transformers loads a masked language model as a causal one; only its attention tells."""
    for is_decoder, code in ((False, "GS-345"), (True, None)):
        base = Base("bert", tmp_path / str(is_decoder))
        bert(is_decoder=is_decoder).save_pretrained(base.path)
        model = load_model(base, ModelConfig(offload=offload))
        assert refusal(lambda: check_causal(model, base, device=torch.device("cpu"))) == code  # noqa: B023


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 5}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_are_taken(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = build_llama(**changes).to(dtype)
    assert refusal(lambda: check_causal(model, Base("base", tmp_path), device=torch.device("cpu"))) is None
    assert vocabulary(model) == changes.get("vocab_size", 384)


@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
def test_an_encoder_decoder_without_the_tokens_of_its_decoder_is_refused(tmp_path: Path, name: str) -> None:
    build_t5().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: None}))
    with pytest.raises(InputError) as caught:
        load_model(Base("t5", tmp_path), ModelConfig())
    assert caught.value.code == "GS-343"
    assert f"{name} None" in str(caught.value.fields["actual"])


def refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except InputError as err:
        return err.code
    return None
