"""DoRA: full rank; exact where nothing is truncated, and its stated error true where something is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from proving import converted, logits_of, merged, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_PATHS, build_gpt2, build_llama

from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import InputError, UsageError


def trained_dora(folder: Path, model: Any, **settings: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, **settings)
    trained = train(get_peft_model(model, config), steps=8, lr=1e-2)
    trained.save_pretrained(folder)
    return trained


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.1}])
def test_dora_is_exact_at_full_rank(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    model = trained_dora(tmp_path / "adapter", build_llama(), target_modules="all-linear", **settings)
    trained = logits_of(model)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", trained, family="dora", tolerance=0.0)
    assert done.modules["model.layers.0.mlp.down_proj"].full_rank == 32
    assert any("merging it" in note for note in done.reading.notes)


def test_dora_on_conv1d(tmp_path: Path, tiny_gpt2: Path) -> None:
    model = trained_dora(tmp_path / "adapter", build_gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    trained = logits_of(model)
    prove_exact(tmp_path / "adapter", tiny_gpt2, tmp_path / "out", trained, family="dora", tolerance=0.0)


def test_modules_without_a_magnitude_are_plain(tmp_path: Path, tiny_base: Path) -> None:
    """As PEFT would compute them, had only some modules been DoRA: two adapters, one of each kind, give the halves."""
    model = trained_dora(tmp_path / "adapter", build_llama(), target_modules="all-linear")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "q_proj.lora_magnitude" not in name}
    save_file(tensors, file)
    done = converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="dora", tolerance=0.0)
    assert done.modules["model.layers.0.self_attn.q_proj"].full_rank == 4
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    norm = float(layer.get_delta_weight("default").detach().norm())
    assert done.modules["model.layers.0.self_attn.q_proj"].norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("settings", [{"rank": 2}, {"tolerance": 0.3}])
def test_the_stated_errors_are_true(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    """Against PEFT's own merge: merged weights less the base's, and less what was written."""
    model = trained_dora(tmp_path / "adapter", build_llama(), target_modules="all-linear")
    done = converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="dora", **settings)
    merged = {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}
    tensors, base = load_file(tmp_path / "out" / "adapter_model.safetensors"), BaseWeights(tiny_base)
    for path in LLAMA_PATHS:
        exact = merged[f"{path}.weight"] - base.weight(path).double()
        prefix = f"base_model.model.{path}.lora_"
        written = torch.zeros_like(exact)
        if f"{prefix}A.weight" in tensors:
            written = tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()
        assert done.modules[path].norm == pytest.approx(float(exact.norm()), rel=1e-4)
        assert done.modules[path].error == pytest.approx(float((exact - written).norm()), rel=1e-4, abs=1e-5)
    assert 0.05 < done.error < 0.9


def test_refusals(tmp_path: Path, tiny_base: Path) -> None:
    trained_dora(tmp_path / "adapter", build_llama(), target_modules=["q_proj"])
    with pytest.raises(UsageError, match="GS-231"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="dora")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "magnitude" in name)
    for wrong in (tensors[name][:-1], tensors[name][:1], torch.cat([tensors[name], tensors[name]])):
        save_file(tensors | {name: wrong.contiguous()}, file)
        with pytest.raises(InputError, match="GS-3155"):
            converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="dora", rank=2)
        with pytest.raises(InputError, match="GS-3155"):
            merged(tmp_path / "adapter", tiny_base, tmp_path / "out")
    save_file(tensors | {name.replace("q_proj", "o_proj"): tensors[name].clone()}, file)
    with pytest.raises(InputError, match="GS-3154"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="dora", rank=2)
    save_file({key: tensor for key, tensor in tensors.items() if "magnitude" not in key}, file)
    with pytest.raises(InputError, match="GS-3151"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="dora", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings
@pytest.mark.parametrize("vocabulary", [384, 32])
def test_dora_on_embeddings_is_refused(tmp_path: Path, vocabulary: int) -> None:
    """PEFT's magnitude is one number for each column there: as many as the rows are where both are 32."""
    build_llama(vocab_size=vocabulary).save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["embed_tokens"], use_dora=True)
    model = get_peft_model(build_llama(vocab_size=vocabulary), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="GS-3155"):
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    with pytest.raises(InputError, match="GS-3155"):
        converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
