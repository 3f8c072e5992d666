"""Bases that must not be taken as they are: holes, a stray adapter, float16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from gora_serve.config import ModelConfig
from gora_serve.errors import InputError, UsageError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.training.models import load_model


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
