"""Adapters merged into models: logits of the unmerged ones, each weight rounded once, nothing lost, nothing tied wrong.

The oracle is PEFT on the untouched base; for rounding it is the sum in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from proving import (
    EXACT,
    converted,
    copy_embeddings_to_head,
    input_ids,
    load_on,
    logits_of,
    merged,
    off_by,
    prove_merged,
    train,
)
from safetensors.torch import load_file, save_file
from test_experts import EXPERTS, SIZES, build_gpt_oss, build_mixtral, build_qwen
from tiny_models import build_bart, build_gpt2, build_llama, build_t5, build_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from converters.merging import merge_model, verify_merged
from converters.reading import Inputs
from gora_serve.adapter.names import saved_as
from gora_serve.config import MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError, MismatchError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import check_folder
from gora_serve.integrity.manifest import hash_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings, tied heads and fan_in_fan_out
WEIGHTS = "adapter_model.safetensors"
ALL = "all-linear"


def build_gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_experts_per_tok", "tie_word_embeddings")}
    return GemmaForCausalLM(GemmaConfig(**sizes, intermediate_size=48, head_dim=8)).float().requires_grad_(False).eval()


def build_dense_qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "num_experts_per_tok"}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=48)).float().requires_grad_(False).eval()


def pairs_of_ids() -> dict[str, Tensor]:
    return {"input_ids": input_ids(), "labels": input_ids().flip(0)}


def make(folder: Path, build: Callable[[], Any], *, ask: Callable[[Any], Tensor] = logits_of, rows: Any = None,
         **settings: Any) -> Tensor:  # fmt: skip
    """Save base and trained adapter into the folder; return the trained model's logits."""
    build().save_pretrained(folder / "base", max_shard_size="60KB")
    model = train(get_peft_model(build(), LoraConfig(**{"r": 4, "lora_alpha": 8} | settings)), **(rows or {}))
    model.save_pretrained(folder / "adapter")
    logits = ask(model)
    assert off_by(ask(build()), logits) > 1000 * EXACT, "the adapter does nothing: this test could not fail"
    return logits


def prove(folder: Path, logits: Tensor, **settings: Any) -> Any:
    return prove_merged(folder / "adapter", folder / "base", folder / "out", logits, **settings)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (build_gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
        (build_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
        (build_gemma, {"target_modules": ALL}),
        (build_dense_qwen, {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        (build_llama, {"target_modules": ALL, "use_dora": True}),
        (build_qwen, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        (build_mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        (build_gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),  # fused, transposed, with biases
        (build_dense_qwen, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
        (build_dense_qwen, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
        (build_dense_qwen, {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm", "v_proj"]}),
    ],
)  # fmt: skip
def test_causal_models(tmp_path: Path, build: Callable[[], Any], settings: dict[str, Any]) -> None:
    logits = make(tmp_path, build, **settings)
    done = prove(tmp_path, logits)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    base = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == base["weight_map"]
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in tensors_of(tmp_path / "out").values())
    assert done.roots.weights == hash_model(tmp_path / "out").roots.weights
    assert done.base_roots == hash_model(tmp_path / "base").roots


@pytest.mark.parametrize("build", [build_t5, build_bart])
def test_encoder_decoders(tmp_path: Path, build: Callable[[], Any]) -> None:
    rows = pairs_of_ids()
    ask = partial(logits_of, **rows)
    targets = ["q", "v", "wi_0", "wo"] if build is build_t5 else ["q_proj", "fc1", "out_proj"]
    logits = make(tmp_path, build, ask=ask, rows=rows, target_modules=targets)
    prove(tmp_path, logits, ask=ask, auto=AutoModelForSeq2SeqLM)


def build_pair() -> Any:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, GPT2Config

    torch.manual_seed(0)
    encoder = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    decoder = GPT2Config(
        vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64, add_cross_attention=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return EncoderDecoderModel(config).float().requires_grad_(False).eval()


@pytest.mark.parametrize("targets", [["attn.c_proj", "q_attn"], ["c_attn"]])
def test_gpt2_as_the_decoder_of_a_pair(tmp_path: Path, targets: list[str]) -> None:
    """Its Conv1D lie as (in, out) there too; of square ones the shape does not tell."""
    build_pair().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(build_pair(), config)
    model.save_pretrained(tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    theirs = model.merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name


def test_a_classifier_that_the_base_lacks(tmp_path: Path) -> None:
    def build() -> Any:
        build_llama().save_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)

    def ask(model: Any) -> Tensor:
        return logits_of(model, input_ids=input_ids())

    rows = {"input_ids": input_ids(), "labels": torch.tensor([0, 1, 2, 4])}
    model = train(get_peft_model(build(), LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")), **rows)
    model.save_pretrained(tmp_path / "adapter")
    logits = ask(model)
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.num_labels == 5
    assert found.config.architectures == ["LlamaForSequenceClassification"]
    assert off_by(ask(found), logits) < EXACT


def test_a_classifier_of_several_layers(tmp_path: Path) -> None:
    """PEFT saves RoBERTa's classifier whole: two linear layers, which the base lacks."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    RobertaForMaskedLM(RobertaConfig(vocab_size=384, **sizes)).save_pretrained(tmp_path / "base")

    def build() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    def ask(model: Any) -> Tensor:
        return logits_of(model, input_ids=input_ids())

    config = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = train(get_peft_model(build(), config), input_ids=input_ids(), labels=torch.tensor([0, 1, 2, 2]))
    model.save_pretrained(tmp_path / "adapter")
    logits = ask(model)
    converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert off_by(ask(PeftModel.from_pretrained(build(), tmp_path / "plain")), logits) < EXACT
    for adapter in ("adapter", "plain"):
        merged(tmp_path / adapter, tmp_path / "base", tmp_path / f"{adapter}-merged")
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{adapter}-merged")
        assert (found.config.num_labels, found.config.architectures) == (3, ["RobertaForSequenceClassification"])
        assert off_by(ask(found), logits) < EXACT


def test_a_part_of_a_classifier_is_saved_alone() -> None:
    both = ("classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight")
    assert saved_as(both) == ["classifier"]
    assert saved_as(both[2:]) == ["classifier.out_proj"]
    assert saved_as(("score.weight", "model.norm.weight")) == ["model.norm", "score"]


@pytest.mark.parametrize("build", [build_llama, partial(build_llama, tie_word_embeddings=True)])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_a_resized_vocabulary(tmp_path: Path, build: Callable[[], Any], targets: list[str]) -> None:
    build().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    resized = build()
    resized.resize_token_embeddings(390, mean_resizing=False)
    settings = {} if len(targets) > 1 else {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = train(get_peft_model(resized, LoraConfig(r=4, target_modules=targets, **settings)))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(6)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    logits = logits_of(model)
    if len(targets) > 1 and build is build_llama:  # PEFT saves no head then
        with pytest.raises(BindingError) as caught:
            merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
        assert caught.value.code == "GS-4401"
        return
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.vocab_size == 390
    assert off_by(logits_of(found), logits) < EXACT
    tokenizer_file = "tokenizer.json"
    assert (tmp_path / "out" / tokenizer_file).read_bytes() == (tmp_path / "adapter" / tokenizer_file).read_bytes()


def test_embeddings_of_another_base_are_refused(tmp_path: Path) -> None:
    """LoRA over embeddings that were resized: what it was trained over must be the base's, as far as that goes."""
    build_llama(1).save_pretrained(tmp_path / "base")
    resized = build_llama(0)
    resized.resize_token_embeddings(390, mean_resizing=False)
    model = train(get_peft_model(resized, LoraConfig(r=4, target_modules=["embed_tokens"])))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(BindingError) as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert caught.value.code == "GS-4402"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_head_gets_a_tensor_of_its_own(tmp_path: Path, target: str) -> None:
    build = partial(build_llama, tie_word_embeddings=True)
    logits = make(tmp_path, build, target_modules=["q_proj", target])
    done = prove(tmp_path, logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert [one.name for one in done.plan.targets if one.fresh] == ["lm_head.weight"]
    # what PEFT makes of it is wrong for the other of the two, and verify says so
    model = PeftModel.from_pretrained(build(), tmp_path / "adapter").merge_and_unload()
    model.save_pretrained(tmp_path / "theirs")
    check = verify_merged(tmp_path / "theirs", [(tmp_path / "adapter", 1.0)], Base("base", tmp_path / "base"))
    assert check.replay.verdict == "differs"
    said = "own update is lost" if target == "lm_head" else "it gets their update"
    assert said in check.replay.tensors["lm_head.weight"].reason


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "v_proj"])
def test_a_tied_head_that_is_stored_as_a_copy(tmp_path: Path, target: str) -> None:
    """One that gets another update than the embeddings is tied no more, so that no loader throws its tensor away."""
    build = partial(build_llama, tie_word_embeddings=True)
    logits = make(tmp_path, build, target_modules=["q_proj", target])
    build().save_pretrained(tmp_path / "whole")
    base = copy_embeddings_to_head(tmp_path / "whole")
    done = prove_merged(tmp_path / "adapter", base, tmp_path / "out", logits)
    assert not any(one.fresh for one in done.plan.targets)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (target == "v_proj")
    if target != "v_proj":
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        found = verify_merged(tmp_path / "out", [(tmp_path / "adapter", 1.0)], Base("base", base)).replay
        assert found.verdict == "differs"


def test_a_whole_model_over_a_copy_of_its_head_stays_tied(tmp_path: Path) -> None:
    build_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    copy_embeddings_to_head(tmp_path / "base")
    model = build_llama(tie_word_embeddings=True)
    model.model.embed_tokens.weight.data *= 1.1
    model.save_pretrained(tmp_path / "model")
    merged(tmp_path / "model", tmp_path / "base", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], model.model.embed_tokens.weight)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.parametrize("module", ["shared", "lm_head"])
def test_what_cannot_be_untied_is_refused(tmp_path: Path, module: str) -> None:
    make(tmp_path, build_t5, ask=partial(logits_of, **pairs_of_ids()), rows=pairs_of_ids(),
         target_modules=["q", module])  # fmt: skip
    with pytest.raises(BindingError) as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert caught.value.code == "GS-4400"
    assert not (tmp_path / "out").exists()


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """Against PEFT with both adapters active, the second's B times its weight; DoRA and modules_to_save among them."""
    build_llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    exact = {name: tensor.double() for name, tensor in tensors_of(tmp_path / "base").items()}
    given = []
    for index, settings in enumerate(({"target_modules": ALL}, {"target_modules": ["q_proj"], "use_dora": True},
                                      {"target_modules": ["v_proj"], "modules_to_save": ["norm"]})):  # fmt: skip
        model = train(get_peft_model(build_llama(), LoraConfig(r=3, **settings)), steps=3 + index)
        model.save_pretrained(tmp_path / f"adapter{index}")
        weight = (1.0, 0.5, -0.25)[index]
        given.append((tmp_path / f"adapter{index}", weight))
        theirs = model.double().merge_and_unload().state_dict()
        base = build_llama().state_dict()
        for name in exact:
            exact[name] += weight * (theirs[name] - base[name].double())
    done = merge_model(given, Base("base", tmp_path / "base"), tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.allclose(tensor.double(), exact[name], rtol=0, atol=3e-7), name
    assert [one["weight"] for one in done.receipt["adapters"]] == [1.0, 0.5, -0.25]
    check = verify_merged(tmp_path / "out", given, Base("base", tmp_path / "base"))
    assert check.replay.verdict == "exact"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_embeddings_of_one_and_the_head_of_another(tmp_path: Path, order: tuple[int, int]) -> None:
    """Whatever their order, each gets its own update, and a tied head is parted from the embeddings."""
    build_gpt2().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    exact = {}
    for index, name in enumerate(("transformer.wte.weight", "lm_head.weight")):
        settings = {"target_modules": ["c_attn", name.split(".")[-2]], "fan_in_fan_out": True}
        model = train(get_peft_model(build_gpt2(), LoraConfig(r=3, **settings)))
        model.save_pretrained(tmp_path / f"adapter{index}")
        layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        exact[name] = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    given = [(tmp_path / f"adapter{index}", 1.0) for index in order]
    merge_model(given, Base("base", tmp_path / "base"), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert all(torch.allclose(found[name], tensor, rtol=0, atol=3e-7) for name, tensor in exact.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_weight_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """No element but those of ties is further from the float64 sum than the nearest number of the type."""
    make(tmp_path, build_llama, target_modules=ALL)
    build_llama().to(dtype).save_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    build_llama().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    done = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    base, adapter = tensors_of(tmp_path / "base"), load_file(tmp_path / "adapter" / WEIGHTS)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == dtype
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" not in adapter:
            assert torch.equal(tensor, base[name])
            continue
        delta = 2 * adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double()
        exact = base[name].double() + delta
        wrong = tensor != exact.to(dtype)
        assert int(wrong.sum()) <= 2  # a float32 sum may fall on the other side of a tie
        tally = done.receipt["tensors"][name]
        assert tally["changed"] == int((tensor != base[name]).sum())
        assert tally["max_error"] == pytest.approx(float((tensor.double() - exact).abs().max()), rel=1e-3)
        assert tally["update"] == pytest.approx(float(delta.norm()), rel=1e-4)


def test_an_update_too_small_for_the_type_is_told(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=ALL)
    shutil.rmtree(tmp_path / "base")
    build_llama().bfloat16().save_pretrained(tmp_path / "base")
    done = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", weight=1e-4)
    assert done.faint
    assert done.receipt["totals"]["held"] < 0.5
    done = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "wide", weight=1e-4, dtype="float32")
    assert not done.faint
    assert {one.dtype for one in tensors_of(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_the_output_is_whole_and_the_same_every_time(tmp_path: Path, tiny_base: Path) -> None:
    make(tmp_path, build_llama, target_modules=ALL)
    before = hash_model(tiny_base)
    for name in ("one", "two"):
        merged(tmp_path / "adapter", tiny_base, tmp_path / name)
        check_folder(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    same = [(tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files]
    assert all(same)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "one" / name).read_bytes() == (tiny_base / name).read_bytes()
    assert hash_model(tiny_base) == before


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    from converters.convert import convert

    make(tmp_path, build_llama, target_modules=ALL)
    convert(tmp_path / "adapter", Base("tiny", tiny_base), tmp_path / "bound")
    build_llama(5).save_pretrained(tmp_path / "other")
    merged(tmp_path / "bound", tiny_base, tmp_path / "out")
    with pytest.raises(BindingError) as caught:
        merged(tmp_path / "bound", tmp_path / "other", tmp_path / "wrong")
    assert caught.value.code == "GS-401"
    assert not (tmp_path / "wrong").exists()


def spoiled(folder: Path, key: str, change: Callable[[Tensor], Tensor]) -> None:
    file = next(one for one in folder.glob("*.safetensors") if key in load_file(one))
    tensors = load_file(file)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("change", [lambda t: t * float("nan"), lambda t: t[:, :3], lambda t: t * 1e38 * 1e38])
def test_broken_factors_leave_nothing(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    spoiled(tmp_path / "adapter", "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", change)
    with pytest.raises((InputError, BindingError)):
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_sum_that_the_type_cannot_hold(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    with pytest.raises(InputError) as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", weight=1e8, dtype="float16")
    assert caught.value.code == "GS-3401"


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    spoiled(tmp_path / "base", "model.layers.0.self_attn.q_proj.weight", lambda t: t.to(torch.uint8))
    with pytest.raises(InputError) as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert caught.value.code == "GS-3117"


# verify, of merges by others


def theirs(folder: Path, build: Callable[[], Any], dtype: torch.dtype, *, scale: float = 1.0) -> Path:
    """What PEFT makes of base and adapter, loaded and merged in a type."""
    model = PeftModel.from_pretrained(build().to(dtype), folder / "adapter", autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (parameter.data * (scale if "lora_B" in name else 1)).to(dtype)
    model.merge_and_unload().save_pretrained(folder / "theirs")
    return folder / "theirs"


def judge(folder: Path, model: Path) -> Any:
    return verify_merged(model, [(folder / "adapter", 1.0)], Base("base", folder / "base")).replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"target_modules": ALL}, {"target_modules": ALL, "use_dora": True}])
def test_merges_of_peft_are_within_rounding(tmp_path: Path, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    make(tmp_path, lambda: build_llama().to(dtype), **settings)
    found = judge(tmp_path, theirs(tmp_path, build_llama, dtype))
    assert found.verdict in ("exact", "rounded"), [(one.name, one.reason) for one in found.of("differs")]
    assert dtype == torch.float32 or len(found.of("rounded")) > 0


@pytest.mark.parametrize(("scale", "word"), [(0.0, "not in it"), (0.5, "0.50 times"), (2.0, "2.00 times")])
def test_merges_of_another_scale_are_named(tmp_path: Path, scale: float, word: str) -> None:
    make(tmp_path, lambda: build_llama().bfloat16(), target_modules=ALL)
    found = judge(tmp_path, theirs(tmp_path, build_llama, torch.bfloat16, scale=scale))
    assert len(found.of("differs")) == 14
    assert all(word in one.reason for one in found.of("differs"))


def test_one_element_that_differs_is_found(tmp_path: Path) -> None:
    make(tmp_path, lambda: build_llama().bfloat16(), target_modules=["q_proj"])
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")

    def flipped(tensor: Tensor) -> Tensor:
        tensor[3, 5] += tensor.abs().max()
        return tensor

    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        spoiled(tmp_path / name, name, flipped)
        found = judge(tmp_path, tmp_path / name)
        assert [one.name for one in found.of("differs")] == [name]
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises((MismatchError, InputError)):
        judge(tmp_path, tmp_path / "out")


def test_an_update_below_the_steps_of_the_type_must_be_there_in_sum(tmp_path: Path) -> None:
    """Where single elements say nothing: a small update, added to most elements and to none."""
    build = partial(build_llama, hidden_size=64, intermediate_size=128)
    make(tmp_path, lambda: build().bfloat16(), target_modules=["up_proj"])
    shrink = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    spoiled(tmp_path / "adapter", shrink, lambda t: torch.full_like(t, 2e-3) * torch.randn(t.shape).sign())
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert judge(tmp_path, tmp_path / "out").verdict == "exact"
    spoiled(tmp_path / "out", name, lambda _: tensors_of(tmp_path / "base")[name])
    assert "not in it" in judge(tmp_path, tmp_path / "out").tensors[name].reason


# bases in 4 bits


def quantizer() -> Callable[[Tensor], Tensor]:
    """Any rounding that is coarse: to 16 levels of each row's largest value."""

    def coarse(weight: Tensor) -> Tensor:
        step = weight.float().abs().amax(1, keepdim=True) / 8
        return (weight.float() / step).round() * step

    return coarse


def test_both_errors_of_a_base_in_4_bits(tmp_path: Path) -> None:
    make(tmp_path, lambda: build_llama().bfloat16(), target_modules=["q_proj", "down_proj"])
    outputs = {}
    for base_as in ("bf16", "nf4"):
        outputs[base_as] = merge_model(
            [(tmp_path / "adapter", 1.0)], Base("base", tmp_path / "base"), tmp_path / base_as,
            MergeConfig(base_as=base_as), rounder=quantizer,  # type: ignore[arg-type]
        )  # fmt: skip
    base, adapter = tensors_of(tmp_path / "base"), load_file(tmp_path / "adapter" / WEIGHTS)
    written = {base_as: tensors_of(tmp_path / base_as) for base_as in outputs}
    squares = dict.fromkeys(outputs, 0.0)
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            delta = 2 * adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double()
            trained = quantizer()(weight).double() + delta
            for base_as in outputs:
                squares[base_as] += float((written[base_as][name].double() - trained).square().sum())
        elif "_proj" in name:
            assert torch.equal(written["nf4"][name], quantizer()(weight).bfloat16())
            assert torch.equal(written["bf16"][name], weight)
        else:
            assert torch.equal(written["nf4"][name], weight)
    for done in outputs.values():
        totals = done.receipt["totals"]
        assert totals["error_on_stored"] == pytest.approx(squares["bf16"] ** 0.5, rel=1e-3)
        assert totals["error_on_quantized"] == pytest.approx(squares["nf4"] ** 0.5, rel=1e-3)
        assert totals["error_on_stored"] > 10 * totals["error_on_quantized"]


@pytest.mark.parametrize("base_as", ["bf16", "nf4"])
def test_dora_of_a_conv1d_on_a_base_in_4_bits(tmp_path: Path, base_as: Any) -> None:
    """The lengths are those of the weight that the update is added to, in the model and in what is told of both."""
    make(tmp_path, lambda: build_gpt2().bfloat16(), target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    done = merge_model(
        [(tmp_path / "adapter", 1.0)], Base("base", tmp_path / "base"), tmp_path / "out",
        MergeConfig(base_as=base_as, dtype="float32"), rounder=quantizer,  # type: ignore[arg-type]
    )  # fmt: skip
    base, adapter, found = (tensors_of(tmp_path / "base"), load_file(tmp_path / "adapter" / WEIGHTS),
                            tensors_of(tmp_path / "out"))  # fmt: skip
    for name in [name for name in base if name.endswith("c_attn.weight")]:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        exact = {}
        for kind, W in (("bf16", base[name].T.double()), ("nf4", quantizer()(base[name].T).double())):
            moved = W + 2 * adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double()
            exact[kind] = (adapter[f"{key}magnitude_vector"].double() / moved.norm(dim=1))[:, None] * moved
        assert off_by(found[name].T.double(), exact[base_as]) < 1e-6
        away = float((exact["bf16"] - exact["nf4"]).square().sum())
        assert done.written.tallies[name].squared_stored == pytest.approx(away, rel=1e-4)
    check = verify_merged(tmp_path / "out", [(tmp_path / "adapter", 1.0)], Base("base", tmp_path / "base"),
                          rounder=quantizer)  # type: ignore[arg-type]  # fmt: skip
    assert check.replay.verdict == "exact"


def test_unmerged_and_merged_in_bfloat16(tmp_path: Path) -> None:
    """The merged model is no further from the float64 sum than the correctly rounded one is."""
    make(tmp_path, lambda: build_llama().bfloat16(), target_modules=ALL)
    exact = load_on(tmp_path / "base", tmp_path / "adapter").double()
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64), tmp_path / "adapter"
    ).merge_and_unload().bfloat16().double()  # fmt: skip
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    right = logits_of(exact)
    assert off_by(logits_of(found), right) <= off_by(logits_of(reference), right) * 1.001


def test_inputs_of_families_are_taken(tmp_path: Path) -> None:
    """A file of one family that says that it is another's is refused as convert refuses it."""
    make(tmp_path, build_llama, target_modules=["q_proj"])
    with pytest.raises(InputError):
        merge_model([(tmp_path / "adapter", 1.0)], Base("base", tmp_path / "base"), tmp_path / "out",
                    MergeConfig(family="vera"), Inputs())  # fmt: skip
    assert BaseWeights(tmp_path / "base").find("lm_head") == "lm_head.weight"


def test_a_matrix_of_no_elements_is_merged_and_judged(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    model = build_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    for folder in ("base", "adapter"):
        file = tmp_path / folder / "model.safetensors"
        save_file(load_file(file) | {"model.layers.0.extra.weight": torch.zeros(4, 0)}, file, {"format": "pt"})
    merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "adapter")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert judge(tmp_path, tmp_path / "out").verdict == "exact"
