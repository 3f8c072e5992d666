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
from gora_serve.errors import InputError, UsageError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.training.models import check_causal, load_model, vocabulary


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
