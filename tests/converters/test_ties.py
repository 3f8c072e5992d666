"""Heads that are tied to embeddings, whatever a model calls the two: merged as PEFT computes them, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from proving import EXACT, input_ids, logits_of, merged, off_by, prove_merged, train
from safetensors.torch import load_file, save_file

from gora_serve.errors import BindingError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings, tied heads and fan_in_fan_out
TIED: dict[str, Any] = {"vocab_size": 96, "tie_word_embeddings": True}


def build(model: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    built = model(model.config_class(**(TIED | sizes))).float().requires_grad_(False).eval()
    built.get_input_embeddings().weight.normal_(std=0.2)
    return built


ATTENTION = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
RECURRENT = {"num_hidden_layers": 2, "hidden_size": 16}
GPT = {"n_layer": 1, "n_head": 2, "n_embd": 16}
mamba = partial(build, transformers.MambaForCausalLM, state_size=4, **RECURRENT)
openai_gpt = partial(build, transformers.OpenAIGPTLMHeadModel, **GPT)
ctrl = partial(build, transformers.CTRLLMHeadModel, dff=32, **GPT)
biogpt = partial(build, transformers.BioGptForCausalLM, scale_embedding=False, **ATTENTION)
rwkv = partial(build, transformers.RwkvForCausalLM, attention_hidden_size=16, **RECURRENT)
bert = partial(build, transformers.BertForMaskedLM, **ATTENTION)
bert_classifier = partial(build, transformers.BertForSequenceClassification, num_labels=3, **ATTENTION)


def adapted(folder: Path, build: Callable[[], Any], **settings: Any) -> torch.Tensor:
    """Save base and trained adapter; return the trained model's logits."""
    build().save_pretrained(folder / "base")
    model = train(get_peft_model(build(), LoraConfig(**{"r": 3, "task_type": "CAUSAL_LM"} | settings)), lr=0.02)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    logits = logits_of(model)
    assert off_by(logits_of(build()), logits) > 1000 * EXACT, "the adapter does nothing: this test could not fail"
    return logits


CASES = [
    (mamba, "embeddings", "lm_head"), (openai_gpt, "tokens_embed", "lm_head"), (ctrl, "w", "lm_head"),
    (biogpt, "embed_tokens", "output_projection"), (rwkv, "embeddings", "head"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "embeddings", "head"), CASES, ids=[case[1] for case in CASES])
def test_the_head_keeps_what_the_embeddings_were(
    tmp_path: Path, build: Callable[[], Any], embeddings: str, head: str
) -> None:
    logits = adapted(tmp_path, build, target_modules=[embeddings])
    done = prove_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", logits, family="lora")
    assert [one.name for one in done.plan.targets if one.fresh] == [f"{head}.weight"]


def renamed(folder: Path, old: str, new: str) -> None:
    """Call a tensor's module something else in base and adapter, as a model that nobody knows would."""
    for file in (folder / "base" / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"):
        tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{old}"', f'"{new}"'))


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]},
                                      {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}])  # fmt: skip
def test_embeddings_that_an_unknown_head_may_read_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapted(tmp_path, biogpt, **settings)
    renamed(tmp_path, "embed_tokens", "lookup")
    with pytest.raises(BindingError) as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", family="lora")
    assert (caught.value.code, caught.value.fields["tensor"]) == ("GS-4400", "biogpt.lookup.weight")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", family="lora")


def test_a_head_whose_bias_is_tied_too_is_not_parted(tmp_path: Path) -> None:
    """BERT's: with tie_word_embeddings false it would read a bias that no file holds."""
    adapted(tmp_path, bert, target_modules=["word_embeddings"], task_type=None)
    with pytest.raises(BindingError) as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", family="lora")
    assert caught.value.code == "GS-4400"


def test_a_classifier_has_no_head_that_is_tied(tmp_path: Path) -> None:
    bert_classifier().save_pretrained(tmp_path / "base")
    rows = {"input_ids": input_ids(), "labels": torch.tensor([0, 1, 2, 1])}
    model = get_peft_model(bert_classifier(), LoraConfig(r=3, target_modules=["word_embeddings"]))
    train(model, lr=0.02, **rows).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ask = partial(logits_of, input_ids=input_ids())
    prove_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", ask(model), ask=ask,
                 auto=transformers.AutoModelForSequenceClassification, family="lora")  # fmt: skip


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_a_model_without_any_head(tmp_path: Path, task: str | None) -> None:
    """As sentence encoders are saved."""
    trunk = partial(build, transformers.BertModel, **ATTENTION)
    trunk().save_pretrained(tmp_path / "base")
    model = get_peft_model(trunk(), LoraConfig(r=3, target_modules=["query", "word_embeddings"], task_type=task))

    def ask(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return one.eval()(input_ids=input_ids()).last_hidden_state  # type: ignore[no-any-return]

    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(6):
        model(input_ids=input_ids()).last_hidden_state.square().mean().backward()
        optimizer.step()
    assert off_by(ask(trunk()), ask(model)) > 1000 * EXACT
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    prove_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", ask(model), ask=ask,
                 auto=transformers.AutoModel, family="lora")  # fmt: skip


def test_a_classifier_over_a_base_with_a_head(tmp_path: Path) -> None:
    build(transformers.BertForPreTraining, **ATTENTION).save_pretrained(tmp_path / "base")
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    rows = {"input_ids": input_ids(), "labels": torch.tensor([0, 1, 2, 1])}
    model = get_peft_model(
        classifier, LoraConfig(r=3, target_modules=["query", "word_embeddings"], task_type="SEQ_CLS")
    )
    train(model, lr=0.02, **rows).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    logits = logits_of(model, input_ids=input_ids())
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", family="lora")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert off_by(logits_of(loaded, input_ids=input_ids()), logits) < EXACT * max(1.0, float(logits.abs().max()))
