"""Plain LoRA: every way in which PEFT spells ranks, scales and targets, and what it saves beside the factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from proving import (
    EXACT,
    converted,
    copy_embeddings_to_head,
    input_ids,
    load_on,
    logits_of,
    off_by,
    prove_exact,
    train,
)
from safetensors.torch import load_file, save_file
from tiny_models import build_bart, build_gpt2, build_llama, build_t5
from transformers import AutoModelForSeq2SeqLM

from converters.reading import Inputs
from gora_serve.errors import BindingError, GoraError, InputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings, tied heads and fan_in_fan_out
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_base(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def trained(build: Callable[[], Any], config: Any, folder: Path, **saving: Any) -> Any:
    model = train(get_peft_model(build(), config))
    model.save_pretrained(folder, **saving)
    return model


def tied() -> Any:
    return build_llama(tie_word_embeddings=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "1.mlp.down_proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\.mlp.*", "layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"modules_to_save": ["norm"]},  # PEFT saves every module whose name ends so: all layer norms
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 7}, "use_rslora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17, 3]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9], "lm_head": [2, 30]}},
    ],
)  # fmt: skip
def test_plain_lora(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings))
    model = trained(build_llama, config, tmp_path / "adapter")
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))
    assert done.detection.family == "lora"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},  # the head keeps its rows
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 17, 3]},  # the head's rows are replaced too
    ],
)
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_tied_head(tmp_path: Path, settings: dict[str, Any], is_stored: bool) -> None:
    """is_stored: the base's files hold it too, as a copy of the embeddings."""
    base = save_base(tied(), tmp_path / "base")
    if is_stored:
        copy_embeddings_to_head(base)
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | settings))
    model = trained(tied, config, tmp_path / "adapter")
    prove_exact(tmp_path / "adapter", base, tmp_path / "out", logits_of(model))


@pytest.mark.parametrize("build", [build_llama, tied])
def test_trainable_tokens_alone(tmp_path: Path, build: Callable[[], Any]) -> None:
    base = save_base(build(), tmp_path / "base")
    tokens = input_ids().unique()[:3].tolist()
    model = trained(build, TrainableTokensConfig(token_indices=tokens), tmp_path / "adapter")
    done = prove_exact(tmp_path / "adapter", base, tmp_path / "out", logits_of(model))
    assert {module.rank for module in done.modules.values()} == {3}


def test_embeddings_of_gpt2(tmp_path: Path) -> None:
    base = save_base(build_gpt2(), tmp_path / "base")
    config = LoraConfig(r=3, target_modules=["wte", "c_attn", "lm_head"], fan_in_fan_out=True)
    model = trained(build_gpt2, config, tmp_path / "adapter")
    prove_exact(tmp_path / "adapter", base, tmp_path / "out", logits_of(model))


def test_trained_rows_of_any_embeddings(tmp_path: Path) -> None:
    """Also of those that have no token to a row: GPT-2's positions."""
    base = save_base(build_gpt2(), tmp_path / "base")
    config = LoraConfig(r=3, target_modules=["c_attn"], trainable_token_indices={"wpe": [0, 3]}, fan_in_fan_out=True)
    model = trained(build_gpt2, config, tmp_path / "adapter")
    done = prove_exact(tmp_path / "adapter", base, tmp_path / "out", logits_of(model))
    assert "base_model.model.transformer.wpe.lora_embedding_A" in load_file(done.folder / WEIGHTS)


def test_a_state_dict_with_adapter_names_and_copies(tmp_path: Path, tiny_base: Path) -> None:
    """As trainers save it by themselves: `.default.` in the names, all of the base beside the factors."""
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = trained(build_llama, config, tmp_path / "adapter")
    save_file({name: one.clone() for name, one in model.state_dict().items()}, tmp_path / "adapter" / WEIGHTS)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))
    known = done.receipt["tensors"]["without_effect"]
    assert known["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"] == "the base's own"
    assert known["base_model.model.lm_head.original_module.weight"] == "the base's own"


def test_copies_of_embeddings_are_known(tmp_path: Path, tiny_base: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = trained(build_llama, config, tmp_path / "adapter", save_embedding_layers=True)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))
    assert set(done.receipt["tensors"]["without_effect"].values()) == {"the base's own"}
    assert done.receipt["tensors"]["carried"] == []


def test_embeddings_that_were_trained_beside_lora_are_carried(tmp_path: Path, tiny_base: Path) -> None:
    model = get_peft_model(build_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
    train(model).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))
    assert done.receipt["tensors"]["carried"] == ["base_model.model.model.embed_tokens.weight"]


def refused(adapter: Path, base: Path, output: Path, **inputs: Any) -> GoraError:
    with pytest.raises(GoraError) as caught:
        converted(adapter, base, output, inputs=Inputs(**inputs))
    assert not output.exists()
    return caught.value


def edit(adapter: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def test_a_bias_of_lora_is_refused_and_can_be_left_out(tmp_path: Path, tiny_base: Path) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    model = trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), adapter)
    error = refused(adapter, tiny_base, output)
    assert isinstance(error, InputError)
    assert error.code == "GS-3115"
    assert "lora_bias" in str(error)
    done = converted(adapter, tiny_base, output, inputs=Inputs(leave_out=(r"lora_B\.bias",)))
    left_out = done.receipt["tensors"]["without_effect"]
    assert len(left_out) == 2
    assert all("left out by --leave-out: lora_bias" in why for why in left_out.values())
    for module in model.modules():
        if hasattr(module, "lora_B") and getattr(module.lora_B["default"], "bias", None) is not None:
            torch.nn.init.zeros_(module.lora_B["default"].bias)
    prove_like(model, tiny_base, output)


def prove_like(model: Any, base: Path, output: Path) -> None:
    assert off_by(logits_of(load_on(base, output)), logits_of(model)) < EXACT


def test_a_bias_of_lora_that_is_zero_does_nothing(tmp_path: Path, tiny_base: Path) -> None:
    model = trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), tmp_path / "adapter")
    edit(tmp_path / "adapter", lambda tensors: [one.zero_() for name, one in tensors.items() if "bias" in name])
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.zeros_(module.lora_B["default"].bias)
    prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(tmp_path: Path, bias: str) -> None:
    base = save_base(build_gpt2(), tmp_path / "base")
    trained(build_gpt2, LoraConfig(r=4, target_modules=["c_attn"], bias=bias), tmp_path / "adapter")
    error = refused(tmp_path / "adapter", base, tmp_path / "out")
    assert error.code == "GS-3115"
    assert "bias" in str(error)
    assert "leave-out" in str(error)


def test_biases_that_stayed_as_they_were_are_known(tmp_path: Path) -> None:
    base = save_base(build_gpt2(), tmp_path / "base")
    model = get_peft_model(build_gpt2(), LoraConfig(r=4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train(model).save_pretrained(tmp_path / "adapter")
    prove_exact(tmp_path / "adapter", base, tmp_path / "out", logits_of(model))


def test_a_copy_of_other_embeddings_shows_another_base(tmp_path: Path) -> None:
    base = save_base(build_llama(seed=1), tmp_path / "base")
    trained(build_llama, LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "adapter")
    error = refused(tmp_path / "adapter", base, tmp_path / "out")
    assert error.code == "GS-3115"
    assert "base_model.model.model.embed_tokens.base_layer.weight" in str(error)


def test_a_larger_vocabulary_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    model = build_llama()
    model.resize_token_embeddings(390)
    model = train(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    error = refused(tmp_path / "adapter", tiny_base, tmp_path / "out")
    assert isinstance(error, BindingError)
    assert error.code == "GS-450"
    assert "390 tokens" in str(error)


@pytest.mark.parametrize("indices", [None, [5, 17], [5, 17, 17], [5, 17, 384], [5, 17, -1], "5", [5, 17, True]])
def test_tokens_that_do_not_fit_their_rows(tmp_path: Path, tiny_base: Path, indices: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 17, 3])
    trained(build_llama, config, tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": indices}))
    error = refused(tmp_path / "adapter", tiny_base, tmp_path / "out")
    assert error.code == "GS-3116"
    assert str(file) in str(error)


def test_leaving_out_what_is_not_there(tmp_path: Path, tiny_base: Path) -> None:
    trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    error = refused(tmp_path / "adapter", tiny_base, tmp_path / "out", leave_out=("lora_A",))
    assert isinstance(error, UsageError)
    assert error.code == "GS-237"


def change_config(adapter: Path, **changes: Any) -> None:
    file = adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_two_alphas_for_one_module(tmp_path: Path, tiny_base: Path) -> None:
    """PEFT saves a pattern's keys in alphabetical order, so that nobody knows which one training used."""
    trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    change_config(tmp_path / "adapter", alpha_pattern={"q_proj": 16, "layers.0.self_attn.q_proj": 2})
    error = refused(tmp_path / "adapter", tiny_base, tmp_path / "out")
    assert error.code == "GS-3118"
    assert "model.layers.0.self_attn.q_proj" in str(error)


def test_an_adapter_without_its_configuration(tmp_path: Path, tiny_base: Path) -> None:
    trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"], lora_alpha=64), tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).unlink()
    assert refused(tmp_path / "adapter", tiny_base, tmp_path / "out").code == "GS-3126"


def test_a_carried_module_of_another_shape(tmp_path: Path, tiny_base: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    trained(build_llama, config, tmp_path / "adapter")
    edit(tmp_path / "adapter", lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(31)}))
    error = refused(tmp_path / "adapter", tiny_base, tmp_path / "out")
    assert error.code == "GS-405"
    assert "model.norm.weight" in str(error)


def test_names_that_are_not_the_models(tmp_path: Path, tiny_base: Path) -> None:
    """torch.compile puts _orig_mod before every name; PEFT would load nothing of it."""
    trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {name.replace("base_model.model.", "base_model.model._orig_mod."): one for name, one in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    assert refused(tmp_path / "adapter", tiny_base, tmp_path / "out").code == "GS-404"


def test_a_quantized_base(tmp_path: Path, tiny_base: Path) -> None:
    """Plain LoRA needs no weight of the base; its family can be told by --from alone where they cannot be read."""
    base = save_base(build_llama(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    quantized = {name: one.to(torch.float8_e4m3fn) if "proj" in name else one for name, one in tensors.items()}
    save_file(quantized, base / "model.safetensors", {"format": "pt"})
    trained(build_llama, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), tmp_path / "adapter")
    with pytest.raises(InputError, match="quantized") as caught:
        converted(tmp_path / "adapter", base, tmp_path / "out", rank=4)
    assert caught.value.code == "GS-3117"


@pytest.mark.parametrize("build", [build_t5, build_bart])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q", "q_proj"], "trainable_token_indices": {"shared": [5, 9, 40]}},
        {"target_modules": ["q", "q_proj", "embed_tokens"]},
    ],
)
def test_embeddings_that_both_halves_share(tmp_path: Path, build: Callable[[], Any], settings: dict[str, Any]) -> None:
    base = save_base(build(), tmp_path / "base")
    ids = {"input_ids": input_ids(), "labels": input_ids()}
    model = train(get_peft_model(build(), LoraConfig(r=3, task_type="SEQ_2_SEQ_LM", **settings)), **ids)
    model.save_pretrained(tmp_path / "adapter")
    converted(tmp_path / "adapter", base, tmp_path / "out")
    again = load_on(base, tmp_path / "out", auto=AutoModelForSeq2SeqLM)
    assert off_by(logits_of(again, **ids), logits_of(model, **ids)) < EXACT
