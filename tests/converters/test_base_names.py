"""Adapters that PEFT trained on the model without its head, against the base with it: PEFT must find every module."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from proving import EXACT, converted, input_ids, load_on, logits_of, merged, off_by
from safetensors.torch import load_file, save_file
from tiny_models import build_gpt2, build_llama
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaModel,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from converters.combining import merge_adapters
from converters.gap import find_gap
from converters.merging import merge_model
from converters.reading import Inputs
from gora_serve.bind import bind
from gora_serve.config import GapConfig, MergeConfig
from gora_serve.errors import BindingError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.manifest import hash_model
from gora_serve.serving.adapter_dir import read_adapter_dir
from gora_serve.serving.fits import fit_errors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings, tied heads and fan_in_fan_out
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "layers.0.self_attn.q_proj"
lora = partial(LoraConfig, r=4, target_modules=["q_proj", "down_proj"])


def states(model: Any) -> Tensor:
    """What a model without a head says."""
    with torch.no_grad():
        return model.eval()(input_ids=input_ids()).last_hidden_state  # type: ignore[no-any-return]


def trained(base: Path, config: Any, folder: Path, auto: Any = AutoModel) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(auto.from_pretrained(base), config)
    before = states(model) if auto is AutoModel else None
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(6):
        model(input_ids=input_ids())[0].square().mean().backward()
        optimizer.step()
    model.save_pretrained(folder, save_embedding_layers=False)
    assert before is None or off_by(states(model), before) > 1000 * EXACT, "the adapter does nothing"
    return model


def under_the_head(base: Path, model: Any) -> Tensor:
    """The logits of the base's head over the states of a model without one."""
    head = AutoModelForCausalLM.from_pretrained(base).lm_head
    with torch.no_grad():
        return head(states(model))  # type: ignore[no-any-return]


CASES: list[tuple[Callable[[], Any], Any, dict[str, Any]]] = [
    (build_llama, lora(), {}),
    (build_llama, lora(use_rslora=True, rank_pattern={"^layers.0.self_attn.q_proj": 2}), {}),
    (build_llama, lora(use_dora=True), {"rank": 32}),
    (build_llama, lora(target_modules=["q_proj", "embed_tokens"]), {}),
    (build_llama, lora(modules_to_save=["embed_tokens", "norm"]), {}),
    (build_llama, lora(trainable_token_indices=[5, 17, 3]), {}),
    (build_llama, VeraConfig(r=4, target_modules=["q_proj"]), {}),
    (build_gpt2, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True), {}),
]


@pytest.mark.parametrize(("build", "config", "limits"), CASES)
def test_peft_finds_the_modules_under_the_head(
    tmp_path: Path, build: Callable[[], Any], config: Any, limits: dict[str, Any]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build().save_pretrained(base)
    logits = under_the_head(base, trained(base, config, adapter))
    done = converted(adapter, base, tmp_path / "out", **limits)
    assert "the names lack the first part" in str(done.reading.notes)
    assert off_by(logits_of(load_on(base, tmp_path / "out")), logits) < EXACT
    merged(adapter, base, tmp_path / "merged")
    assert off_by(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits) < EXACT


def test_gap_and_bind_say_no_until_it_is_converted(tmp_path: Path, tiny_base: Path) -> None:
    trained(tiny_base, lora(), tmp_path / "adapter")
    base = Base(str(tiny_base), tiny_base)
    report = find_gap(tmp_path / "adapter", base, GapConfig(), Inputs())
    assert not report.gap.within(0.01)
    with pytest.raises(BindingError) as caught:
        bind(tmp_path / "adapter", str(tiny_base), tmp_path / "bound")
    assert (caught.value.code, caught.value.fields["tensor"]) == ("GS-463", "layers.0.mlp.down_proj")
    assert "gora-serve convert" in str(caught.value.fields["try"])
    ways = {task: serve_says(tmp_path / "adapter", tiny_base, task) for task in (None, "FEATURE_EXTRACTION")}
    assert "first part of their names is missing: gora-serve convert" in ways[None]
    assert "PEFT over AutoModel" in ways["FEATURE_EXTRACTION"]
    converted(tmp_path / "adapter", tiny_base, tmp_path / "out")
    assert find_gap(tmp_path / "out", base, GapConfig(), Inputs()).gap.within(0.01)


def serve_says(adapter: Path, base: Path, task: str | None) -> str:
    read = read_adapter_dir("x", adapter)
    read = replace(read, config={**read.config, "task_type": task})
    (error,) = fit_errors(read, hash_model(base).tensors, "LlamaForCausalLM")
    assert error.code == "GS-471"
    return str(error.fields["try"])


def added_by_hand(base: Path, *adapters: Path) -> Tensor:
    """The logits of the base with scale B A of each file added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        config, tensors = json.loads((adapter / CONFIG).read_text()), load_file(adapter / WEIGHTS)
        for name, A in tensors.items():
            if name.endswith(".lora_A.weight"):
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight = model.get_submodule(f"model.{path.removeprefix('model.')}").weight.data
                B = tensors[name.replace("lora_A", "lora_B")]
                weight += config["lora_alpha"] / config["r"] * B @ A
    return logits_of(model)


def test_merged_with_an_adapter_of_the_model_with_its_head(tmp_path: Path, tiny_base: Path) -> None:
    one, other = tmp_path / "headless", tmp_path / "plain"
    trained(tiny_base, lora(), one)
    trained(tiny_base, lora(task_type="CAUSAL_LM"), other, auto=AutoModelForCausalLM)
    logits, base = added_by_hand(tiny_base, one, other), Base(str(tiny_base), tiny_base)
    alone = added_by_hand(tiny_base, other)
    assert off_by(logits, alone) > 1000 * EXACT
    merge_adapters([(one, 1.0), (other, 1.0)], base, tmp_path / "out", MergeConfig(into="adapter", method="cat"))
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), logits) < EXACT
    merge_model([(one, 1.0), (other, 1.0)], base, tmp_path / "model")
    assert off_by(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits) < EXACT


def test_of_a_checkpoint_whose_names_lack_their_first_part(tmp_path: Path) -> None:
    """GPT-2's own: PEFT's adapters of the model with its head have longer names than its files."""
    base = tmp_path / "base"
    build_gpt2().save_pretrained(base)
    file = base / "model.safetensors"
    save_file({name.removeprefix("transformer."): one for name, one in load_file(file).items()}, file, {"format": "pt"})
    config = partial(LoraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    headless, plain = tmp_path / "headless", tmp_path / "plain"
    trained(base, config(), headless)
    model = trained(base, config(task_type="CAUSAL_LM"), plain, auto=AutoModelForCausalLM)
    converted(plain, base, tmp_path / "out")
    assert off_by(logits_of(load_on(base, tmp_path / "out")), logits_of(model)) < EXACT
    both, named = [(headless, 1.0), (plain, 1.0)], Base(str(base), base)
    merge_model(both, named, tmp_path / "model")
    again = load_on(base, plain)
    for name, A in load_file(headless / WEIGHTS).items():
        if ".lora_A." in name:
            path = "transformer." + name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = load_file(headless / WEIGHTS)[name.replace("lora_A", "lora_B")]
            again.base_model.model.get_submodule(path).base_layer.weight.data += 2.0 * (B @ A).T  # alpha 8 / r 4
    assert off_by(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits_of(again)) < EXACT
    refused: list[Callable[[], Any]] = [
        lambda: merge_adapters(both, named, tmp_path / "both", MergeConfig(into="adapter", method="cat")),
        lambda: converted(headless, base, tmp_path / "no"),
        lambda: find_gap(headless, named, GapConfig(), Inputs()),
        lambda: bind(headless, str(base), tmp_path / "bound"),
    ]
    for command in refused:  # the model with its head calls them otherwise, and PEFT would pass over them
        with pytest.raises(BindingError) as caught:
            command()
        assert caught.value.code == "GS-453"


def test_names_of_another_class_stay(tmp_path: Path) -> None:
    """A Whisper for classification has its encoder at the top; the checkpoint, of another class, below `model`."""
    base, given = tmp_path / "base", tmp_path / "given"
    small = {"d_model": 16, "num_mel_bins": 8, "vocab_size": 20, "max_source_positions": 10, "max_target_positions": 10}
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(**small, **sides, **widths, suppress_tokens=None, begin_suppress_tokens=None)
    WhisperForConditionalGeneration(config).save_pretrained(base)
    model = WhisperForAudioClassification.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(given)
    converted(given, base, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(given / WEIGHTS).keys()
    bind(given, str(base), tmp_path / "bound")


@pytest.mark.parametrize("trunk", [False, True])
def test_names_that_are_right_without_a_head_stay(tmp_path: Path, tiny_base: Path, trunk: bool) -> None:
    """Of features, which PEFT loads over AutoModel, and of a base that has no head."""
    base = tiny_base
    if trunk:
        base = tmp_path / "trunk"
        LlamaModel.from_pretrained(tiny_base).save_pretrained(base)
    model = trained(base, lora(task_type=None if trunk else "FEATURE_EXTRACTION"), tmp_path / "adapter")
    converted(tmp_path / "adapter", base, tmp_path / "out")
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "out")
    assert off_by(states(again), states(model)) < EXACT
    bind(tmp_path / "adapter", str(base), tmp_path / "bound")
    merged(tmp_path / "adapter", base, tmp_path / "merged")
    assert off_by(states(AutoModel.from_pretrained(tmp_path / "merged")), states(model)) < EXACT


def test_a_classifier_keeps_its_names(tmp_path: Path, tiny_base: Path) -> None:
    auto = AutoModelForSequenceClassification
    model = trained(tiny_base, lora(task_type="SEQ_CLS"), tmp_path / "adapter", auto=auto)
    done = converted(tmp_path / "adapter", tiny_base, tmp_path / "out")
    assert "first part" not in str(done.reading.notes)
    again = load_on(tiny_base, tmp_path / "out", auto=auto)
    assert off_by(logits_of(again, input_ids=input_ids()), logits_of(model, input_ids=input_ids())) < EXACT


def test_two_names_of_one_module_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    features, plain = tmp_path / "features", tmp_path / "plain"
    trained(tiny_base, lora(task_type="FEATURE_EXTRACTION"), features)
    trained(tiny_base, lora(), plain, auto=AutoModelForCausalLM)
    base = Base(str(tiny_base), tiny_base)
    with pytest.raises(BindingError) as caught:
        merge_adapters([(features, 1.0), (plain, 1.0)], base, tmp_path / "out", MergeConfig(into="adapter"))
    assert (caught.value.code, caught.value.fields["file"]) == ("GS-454", plain / WEIGHTS)
    tensors = load_file(features / WEIGHTS) | load_file(plain / WEIGHTS)
    save_file(tensors, plain / WEIGHTS)
    with pytest.raises(BindingError) as caught:
        converted(plain, tiny_base, tmp_path / "out")
    assert caught.value.code == "GS-454"
