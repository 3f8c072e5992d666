"""Weights of a base by module path, whatever the checkpoint calls them: against the models that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import LLAMA_PATHS, build_gpt2, build_llama, llama_shapes

from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError


def test_a_llama_in_two_shards(tiny_base: Path) -> None:
    base, model = BaseWeights(tiny_base), build_llama()
    for path in LLAMA_PATHS:
        assert torch.equal(base.weight(path), model.get_submodule(path).weight)
        assert base.shape(path) == llama_shapes()[path]
    assert set(base.modules()) == {*LLAMA_PATHS, "model.embed_tokens", "lm_head"}
    assert base.is_embedding("model.embed_tokens")
    assert base.find("model.layers.7.mlp.up_proj") is None
    with pytest.raises(BindingError, match="GS-404"):
        base.weight("model.layers.7.mlp.up_proj")
    with pytest.raises(BindingError, match="GS-404"):
        base.weight("model.norm")  # no matrix


@pytest.mark.parametrize("cut", ["", "transformer."])
def test_gpt2_under_either_of_its_names(tmp_path: Path, cut: str) -> None:
    """Checkpoints of the hub lack the prefix that the model has; Conv1D's weights lie as (in, out)."""
    model = build_gpt2()
    tensors = {name.removeprefix(cut): tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    base = BaseWeights(tmp_path)
    for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"):
        path = f"transformer.h.1.{name}"
        weight = model.get_submodule(path).weight  # (in, out)
        assert torch.equal(base.weight(path), weight.T)
        assert base.shape(path) == (weight.shape[1], weight.shape[0])
    assert torch.equal(base.weight("lm_head"), model.transformer.wte.weight)


def test_a_prefix_that_the_checkpoint_has_and_the_model_lacks(tmp_path: Path) -> None:
    tensors = {"backbone.layers.0.proj.weight": torch.ones(3, 2), "other.layers.1.proj.weight": torch.zeros(3, 2)}
    save_file(tensors | {"more.layers.1.proj.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    base = BaseWeights(tmp_path)
    assert torch.equal(base.weight("layers.0.proj"), torch.ones(3, 2))
    assert base.find("layers.1.proj") is None, "two tensors end so: a guess would be wrong half the time"


def test_an_untied_head_is_not_the_embeddings(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert BaseWeights(tmp_path).find("lm_head") is None
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert BaseWeights(tmp_path).find("lm_head") == "model.embed_tokens.weight"


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="GS-3109"):
        BaseWeights(tmp_path)


def test_one_name_in_two_shards_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x.weight": torch.ones(2, 2)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"x.weight": "a.safetensors", "y.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="GS-344"):
        BaseWeights(tmp_path)
