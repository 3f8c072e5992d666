"""A fully fine-tuned model: its difference to the base as LoRA, against dense differences and SVDs in float64."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from proving import EXACT, converted, input_ids, load_on, logits_of, off_by, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_PATHS, build_bart, build_gpt2, build_llama, build_mixtral, build_t5
from torch import Tensor

from converters.reading import Inputs
from converters.receipt import RECEIPT, Converted
from gora_serve.cli.main import main
from gora_serve.errors import BindingError, GoraError, InputError, MachineError, UsageError

LINEAR = (*LLAMA_PATHS, "lm_head")
NORMS = tuple(
    [f"model.layers.{layer}.{name}_layernorm.weight" for layer in (0, 1) for name in ("input", "post_attention")]
    + ["model.norm.weight"]
)
OTHERS = ("model.embed_tokens.weight", *NORMS)
# PEFT, of modules_to_save that a head is tied to: merging such an adapter is not simple. Loading it is.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

Deltas = dict[str, Tensor]  # module path -> (out, in), float64


def is_matrix(name: str) -> bool:
    return not re.search(r"norm|ln_|embed|shared|wte|wpe|bias", name)


def fine_tune(folder: Path, model: Any, moves: Callable[[str], bool] = is_matrix, **options: Any) -> Any:
    """Train the parameters that `moves` names, and save the whole model. Returns it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(moves(name))
    inputs = options.pop("inputs", {})
    train(model, **options, **inputs).save_pretrained(folder)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, in one file or several."""
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def dense(model: Path, base: Path, paths: Iterable[str] = LINEAR) -> Deltas:
    """W - W0 of each module, by hand."""
    ours, theirs = tensors_of(model), tensors_of(base)
    return {path: ours[f"{path}.weight"].double() - theirs[f"{path}.weight"].double() for path in paths}


def written(folder: Path, exact: Deltas) -> Deltas:
    """What the adapter adds to each module, from its two tensors; zero where it has none. Its form has scale 1."""
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for path, delta in exact.items():
        prefix = f"base_model.model.{path}.lora_"
        found[path] = torch.zeros_like(delta)
        if f"{prefix}A.weight" in tensors:
            found[path] = tensors[f"{prefix}B.weight"].double() @ tensors[f"{prefix}A.weight"].double()
    return found


def spectra(exact: Deltas) -> dict[str, list[float]]:
    """The singular values of each module, largest first, by torch's dense SVD."""
    return {path: torch.linalg.svdvals(delta).tolist() for path, delta in exact.items()}


def receipt_of(folder: Path) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads((folder / RECEIPT).read_text())
    return receipt


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, its logits, and what changed in its linear layers."""

    folder: Path
    base: Path
    logits: Tensor
    exact: Deltas

    def convert(self, output: Path, **options: Any) -> Converted:
        return converted(self.folder, self.base, output, **options)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Tuned:
    """All linear layers trained but one, which stays the base's; the first layer's changes are made small."""
    folder = tmp_path_factory.mktemp("full") / "linear"
    model = fine_tune(folder, build_llama(), lambda name: is_matrix(name) and "1.self_attn.k_proj" not in name)
    start = dict(build_llama().named_parameters())
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.data.copy_(start[name].data + 0.1 * (parameter.data - start[name].data))
    model.save_pretrained(folder)
    return Tuned(folder, tiny_base, logits_of(model), dense(folder, tiny_base))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Tuned:
    """Everything trained: norms and embeddings too."""
    folder = tmp_path_factory.mktemp("full") / "whole"
    model = fine_tune(folder, build_llama(), lambda name: True)
    return Tuned(folder, tiny_base, logits_of(model), dense(folder, tiny_base))


def test_it_is_exact_where_nothing_is_truncated(tmp_path: Path, linear: Tuned) -> None:
    done = prove_exact(linear.folder, linear.base, tmp_path / "out", linear.logits, tolerance=0.0)
    receipt = receipt_of(tmp_path / "out")
    assert (receipt["family"], receipt["truncated"]) == ("full", 0.0)
    assert done.error < 1e-6
    assert sorted(receipt["tensors"]["applied"]) == sorted(f"{path}.weight" for path in LINEAR)
    assert receipt["tensors"]["carried"] == []
    assert receipt["tensors"]["without_effect"] == dict.fromkeys(sorted(OTHERS), "the base's own")
    assert receipt["modules"]["model.layers.1.self_attn.k_proj"]["rank"] == 0
    assert done.modules["lm_head"].full_rank == 32


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 5}, {"tolerance": 0.05}, {"tolerance": 0.6}])
def test_the_errors_of_the_receipt_are_the_dense_truth(tmp_path: Path, linear: Tuned, options: dict[str, Any]) -> None:
    """Per module and in total; and what is written is the best of its rank (Eckart and Young)."""
    linear.convert(tmp_path / "out", **options)
    receipt, values = receipt_of(tmp_path / "out"), spectra(linear.exact)
    after = written(tmp_path / "out", linear.exact)
    errors = {path: float((linear.exact[path] - after[path]).norm()) for path in LINEAR}
    norms = {path: float(linear.exact[path].norm()) for path in LINEAR}
    assert receipt["modules"].keys() == set(LINEAR)
    for path, told in receipt["modules"].items():
        best = math.hypot(*values[path][told["rank"] :])
        assert told["norm"] == pytest.approx(norms[path], rel=1e-6, abs=1e-9)
        assert told["error"] == pytest.approx(errors[path], rel=1e-5, abs=1e-6)
        assert told["truncated"] == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert errors[path] == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert torch.linalg.matrix_rank(after[path], rtol=1e-6) == told["rank"]
    total = math.hypot(*errors.values()) / math.hypot(*norms.values())
    assert receipt["error"] == pytest.approx(total, rel=1e-5)
    assert receipt["truncated"] == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_the_budget_goes_to_the_largest_values_of_all_modules(tmp_path: Path, linear: Tuned, rank: int) -> None:
    """One list of all dense singular values, the largest first; what does not fit closes its module."""
    done = linear.convert(tmp_path / "out", rank=rank)
    cost = {path: sum(delta.shape) for path, delta in linear.exact.items()}
    left, expected, closed = rank * sum(cost.values()), dict.fromkeys(LINEAR, 0), set()
    values = {path: [one for one in found if one > 1e-9] for path, found in spectra(linear.exact).items()}
    for _, path in sorted(((one, path) for path, found in values.items() for one in found), reverse=True):
        closed |= {path} if cost[path] > left else set()
        if path not in closed:
            expected[path], left = expected[path] + 1, left - cost[path]
    ranks = {path: module.rank for path, module in done.modules.items()}
    assert ranks == expected
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) <= rank * sum(cost.values())
    assert len({one for one in ranks.values() if one}) > 1, "the ranks are all the same"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(path for path, one in ranks.items() if one)


def test_no_module_of_large_size_gets_more_than_eight_times_the_rank(tmp_path: Path) -> None:
    """There only the first directions are computed; what is said of the rest must be true nevertheless."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    build_llama(**sizes).save_pretrained(tmp_path / "base")
    fine_tune(tmp_path / "model", build_llama(**sizes), lambda name: "mlp" in name)
    done = converted(tmp_path / "model", tmp_path / "base", tmp_path / "out", rank=1)
    exact = dense(tmp_path / "model", tmp_path / "base", [path for path in done.modules if "lm_head" not in path])
    after, values = written(tmp_path / "out", exact), spectra(exact)
    for path, delta in exact.items():
        told = done.modules[path]
        assert told.error == pytest.approx(float((delta - after[path]).norm()), rel=1e-5, abs=1e-7)
        assert told.error == pytest.approx(math.hypot(*values[path][told.rank :]), rel=1e-3, abs=1e-7)
        assert told.rank <= 8
        assert told.full_rank == (64 if "mlp" in path else 0)


@pytest.mark.parametrize("tolerance", [0.02, 0.2, 0.5, 0.9])
def test_a_tolerance_is_met_and_not_wasted(tmp_path: Path, linear: Tuned, tolerance: float) -> None:
    """With the smallest direction that was kept dropped too, it would be missed."""
    done = linear.convert(tmp_path / "out", tolerance=tolerance)
    whole_norm = math.hypot(*(float(delta.norm()) for delta in linear.exact.values()))
    after, values = written(tmp_path / "out", linear.exact), spectra(linear.exact)
    error = math.hypot(*(float((linear.exact[path] - after[path]).norm()) for path in LINEAR))
    assert error <= tolerance * whole_norm * (1 + 1e-6)
    smallest = min(values[path][module.rank - 1] for path, module in done.modules.items() if module.rank)
    assert math.hypot(error, smallest) > tolerance * whole_norm
    largest = max(found[done.modules[path].rank] for path, found in values.items() if done.modules[path].rank < 16)
    assert smallest >= largest * (1 - 1e-6)


def test_the_form_and_the_dtype_are_those_asked_for(tmp_path: Path, linear: Tuned) -> None:
    done = linear.convert(tmp_path / "out", rank=4, form="padded", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len({tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}) == 1
    after = written(tmp_path / "out", linear.exact)
    error = math.hypot(*(float((linear.exact[path] - after[path]).norm()) for path in LINEAR))
    norm = math.hypot(*(float(delta.norm()) for delta in linear.exact.values()))
    assert done.error == pytest.approx(error / norm, rel=1e-4)


# Planted updates


def plant(model: Any, ranks: Mapping[str, int]) -> None:
    """Add an update of its rank to each module: orthogonal directions of size 1 to 2."""
    generator = torch.Generator().manual_seed(5)
    for path, rank in ranks.items():
        weight = model.get_submodule(path).weight
        left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for size in weight.shape)
        weight.data += left[:, :rank] * torch.linspace(1, 2, rank) @ right[:rank]


def test_planted_ranks_come_back(tmp_path: Path, tiny_base: Path) -> None:
    ranks = {path: (0, 1, 2, 5, 8)[index % 5] for index, path in enumerate(LINEAR)}
    model = build_llama()
    plant(model, {path: rank for path, rank in ranks.items() if rank})
    model.save_pretrained(tmp_path / "model")
    done = prove_exact(tmp_path / "model", tiny_base, tmp_path / "out", logits_of(model), tolerance=1e-5)
    assert {path: module.rank for path, module in done.modules.items()} == ranks
    assert done.error < 1e-5
    exact, base = dense(tmp_path / "model", tiny_base), load_on(tiny_base, tmp_path / "out")
    merged = base.merge_and_unload().state_dict()
    for path in LINEAR:
        assert torch.allclose(merged[f"{path}.weight"], tensors_of(tmp_path / "model")[f"{path}.weight"], atol=1e-5)
        assert torch.linalg.matrix_rank(exact[path], atol=1e-4) == ranks[path]


def test_a_merged_adapter_comes_back(tmp_path: Path, tiny_base: Path) -> None:
    """A full model that is LoRA in truth: what was merged is found again at its rank."""
    model = train(get_peft_model(build_llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")))
    trained = logits_of(model)
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    done = prove_exact(tmp_path / "model", tiny_base, tmp_path / "out", trained, tolerance=1e-4)
    assert {module.rank for path, module in done.modules.items() if path != "lm_head"} == {3}


SHAPES = {"a": (6, 4), "b": (4, 6), "c": (5, 5)}


def model_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A model of no architecture: what the converters read of one."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return folder


@settings(max_examples=15, deadline=None)
@given(ranks=st.fixed_dictionaries({name: st.integers(0, 3) for name in SHAPES}), seed=st.integers(0, 99))
def test_differences_in_whole_numbers_have_their_rank_exactly(ranks: dict[str, int], seed: int) -> None:
    """Float32 holds W0, W and W - W0 without rounding, so that without a tolerance the numerical rank is the rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    before = {f"model.{name}.weight": draw(*shape) for name, shape in SHAPES.items()}
    deltas = {f"model.{name}": draw(out, ranks[name]) @ draw(ranks[name], in_) for name, (out, in_) in SHAPES.items()}
    after = {name: weight + deltas[name.removesuffix(".weight")] for name, weight in before.items()}
    with tempfile.TemporaryDirectory() as place:
        base, model = model_folder(Path(place) / "base", before), model_folder(Path(place) / "model", after)
        if not any(delta.any() for delta in deltas.values()):
            with pytest.raises(InputError, match="GS-3106"):
                converted(model, base, Path(place) / "out", tolerance=0.0)
            return
        done = converted(model, base, Path(place) / "out", tolerance=0.0)
        found = written(Path(place) / "out", {path: delta.double() for path, delta in deltas.items()})
    for path, delta in deltas.items():
        assert done.modules[path].rank == int(torch.linalg.matrix_rank(delta.double()))
        assert torch.allclose(found[path], delta.double(), atol=1e-4)


NAMES = ("model.a.weight", "model.b.weight", "model.b.bias", "model.norm.weight", "model.embed_tokens.weight")


@settings(max_examples=25, deadline=None)
@given(
    changed=st.sets(st.sampled_from(NAMES)), left=st.sets(st.sampled_from(NAMES)), kept=st.sets(st.sampled_from(NAMES))
)
def test_each_tensor_is_applied_carried_left_out_or_refused(changed: set[str], left: set[str], kept: set[str]) -> None:
    """Law: a change that is no matrix's, and that no option names, refuses the whole; all others have one place."""
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(*((4, 4) if name[6] in "abe" else (4,)), generator=generator) for name in NAMES}
    before["model.b.bias"] = torch.ones(4)
    after = {name: tensor + (name in changed) for name, tensor in before.items()}
    inputs = Inputs(leave_out=tuple(map(re.escape, sorted(left))), carry=tuple(map(re.escape, sorted(kept))))
    whole = {name.rpartition(".")[0] for name in kept}  # with a module, all of its tensors are carried
    carried = {name for name in NAMES if name.rpartition(".")[0] in whole} - left
    refused = {name for name in changed - left - carried if name not in NAMES[:2]}
    applied = set(NAMES[:2]) - left - carried
    with tempfile.TemporaryDirectory() as place:
        base, model = model_folder(Path(place) / "base", before), model_folder(Path(place) / "model", after)
        if refused or not applied & changed:
            with pytest.raises(InputError) as caught:
                converted(model, base, Path(place) / "out", inputs=inputs, tolerance=0.0)
            told = str(caught.value.fields.get("actual", ""))
            named = {name for name in NAMES if name in told}
            assert (caught.value.code, named) == (("GS-3157", refused) if refused else ("GS-3106", set()))
            assert not (Path(place) / "out").exists()
            return
        converted(model, base, Path(place) / "out", inputs=inputs, tolerance=0.0)
        tensors = receipt_of(Path(place) / "out")["tensors"]
    assert set(tensors["applied"]) == applied
    assert set(tensors["carried"]) == carried
    assert tensors["without_effect"].keys() == set(NAMES) - applied - carried
    for name, why in tensors["without_effect"].items():
        assert ("left out" in why) == (name in left & changed)


# What LoRA cannot hold


def test_changed_norms_and_embeddings_are_refused_by_name(tmp_path: Path, whole: Tuned) -> None:
    with pytest.raises(InputError, match="GS-3157") as refused:
        whole.convert(tmp_path / "out", rank=4)
    told = dict(line.split(" ") for line in str(refused.value.fields["actual"]).split("; "))
    assert told.keys() == set(OTHERS)
    ours, theirs = tensors_of(whole.folder), tensors_of(whole.base)
    for name, change in told.items():
        expected = float((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm())
        assert float(change) == pytest.approx(expected, rel=1e-3)
    assert "--carry" in str(refused.value.fields["try"])
    assert list(tmp_path.iterdir()) == []


def test_changed_biases_are_refused_by_name_and_the_first_twelve_are_told(tmp_path: Path, tiny_gpt2: Path) -> None:
    fine_tune(tmp_path / "model", build_gpt2(), lambda name: "wte" not in name and "wpe" not in name)
    with pytest.raises(InputError, match="GS-3157") as refused:
        converted(tmp_path / "model", tiny_gpt2, tmp_path / "out", rank=4)
    told = str(refused.value.fields["actual"])
    assert "transformer.h.0.attn.c_attn.bias" in told
    assert "transformer.h.0.ln_1.weight" in told
    assert re.search(r" and 6 more$", told)
    assert "18 tensors" in str(refused.value)


def test_what_is_left_out_is_the_bases_and_stands_in_the_receipt(tmp_path: Path, whole: Tuned) -> None:
    """The adapter is then the model with the base's norms and embeddings: compared as logits."""
    from transformers import AutoModelForCausalLM

    done = whole.convert(tmp_path / "out", tolerance=0.0, inputs=Inputs(leave_out=("norm", "embed_tokens")))
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    model.load_state_dict({name: tensors_of(whole.base)[name] for name in OTHERS}, strict=False)
    assert off_by(logits_of(load_on(whole.base, tmp_path / "out")), logits_of(model)) < EXACT
    assert off_by(logits_of(model), whole.logits) > 1000 * EXACT
    known = receipt_of(tmp_path / "out")["tensors"]["without_effect"]
    assert known.keys() == set(OTHERS)
    for why in known.values():
        assert re.fullmatch(r"left out by --leave-out, relative change 0\.0\d+", why)
    assert any("6 tensors are left out" in note for note in done.reading.notes)


def test_what_is_carried_works_in_peft(tmp_path: Path, whole: Tuned) -> None:
    inputs = Inputs(carry=(r"norm\.weight$", "embed_tokens"))
    done = prove_exact(whole.folder, whole.base, tmp_path / "out", whole.logits, tolerance=0.0, inputs=inputs)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(name.removesuffix(".weight") for name in OTHERS)
    assert receipt_of(tmp_path / "out")["tensors"]["carried"] == sorted(OTHERS)
    assert any("carried whole" in note for note in done.reading.notes)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in OTHERS:
        assert torch.equal(tensors[f"base_model.model.{name}"], tensors_of(whole.folder)[name])


def test_a_linear_layer_can_be_carried_and_both_options_together(tmp_path: Path, whole: Tuned) -> None:
    from transformers import AutoModelForCausalLM

    inputs = Inputs(leave_out=("norm",), carry=("lm_head", "embed", "layers.1.mlp"))
    done = whole.convert(tmp_path / "out", tolerance=0.0, inputs=inputs)
    assert not [path for path in done.modules if path == "lm_head" or "1.mlp" in path]
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    model.load_state_dict({name: tensors_of(whole.base)[name] for name in NORMS}, strict=False)
    assert off_by(logits_of(load_on(whole.base, tmp_path / "out")), logits_of(model)) < EXACT


def test_a_linear_layer_can_be_left_out(tmp_path: Path, linear: Tuned) -> None:
    done = linear.convert(tmp_path / "out", tolerance=0.0, inputs=Inputs(leave_out=("lm_head",)))
    assert "lm_head" not in done.modules
    assert "left out" in done.reading.known["lm_head.weight"]
    assert "lm_head.weight" not in receipt_of(tmp_path / "out")["tensors"]["applied"]


def test_a_classifiers_head_is_carried(tmp_path: Path, tiny_base: Path) -> None:
    """The base has no such head, and the model has none of the base's."""
    from transformers import AutoModelForSequenceClassification

    load = AutoModelForSequenceClassification.from_pretrained
    inputs = {"input_ids": input_ids(), "labels": torch.tensor([0, 1, 2, 0])}
    model = fine_tune(tmp_path / "model", load(tiny_base, num_labels=3), inputs=inputs)
    with pytest.raises(InputError, match="GS-3157") as refused:
        converted(tmp_path / "model", tiny_base, tmp_path / "out", tolerance=0.0)
    assert "score.weight not in the base; lm_head.weight the model lacks it" in str(refused.value)
    chosen = Inputs(carry=("score",), leave_out=("lm_head",))
    converted(tmp_path / "model", tiny_base, tmp_path / "out", tolerance=0.0, inputs=chosen)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    loaded = PeftModel.from_pretrained(load(tiny_base, num_labels=3), tmp_path / "out")
    assert off_by(logits_of(loaded), logits_of(model)) < EXACT


@pytest.mark.parametrize("kind", ["MaskedLM", "TokenClassification", "SequenceClassification"])
def test_models_that_make_no_text(tmp_path: Path, kind: str) -> None:
    """PEFT loads them by no task at all: it asks a causal model to generate, and wants a classifier's head whole."""
    import transformers

    def build() -> Any:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        return getattr(transformers, f"BertFor{kind}")(config).float().eval()

    build().save_pretrained(tmp_path / "base")
    model = build()
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "classifier.weight")):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "base", tmp_path / "out", tolerance=0.0)
    loaded = load_on(tmp_path / "base", tmp_path / "out", auto=getattr(transformers, f"AutoModelFor{kind}"))
    inputs = {"input_ids": input_ids()}
    assert off_by(logits_of(build(), **inputs), logits_of(model, **inputs)) > 1000 * EXACT
    assert off_by(logits_of(loaded, **inputs), logits_of(model, **inputs)) < EXACT


# Tied heads, shared embeddings, Conv1D


def test_a_tied_head_follows_the_carried_embeddings(tmp_path: Path) -> None:
    build_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = fine_tune(tmp_path / "model", build_llama(tie_word_embeddings=True), lambda name: True)
    assert "lm_head.weight" not in tensors_of(tmp_path / "model")
    inputs = Inputs(carry=("norm", "embed"))
    done = prove_exact(
        tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), tolerance=0.0, inputs=inputs
    )
    assert "lm_head" not in done.modules
    assert "lm_head.weight" in done.reading.adapter.carried


def untied(seed: int = 0) -> Any:
    """The tied model with a head of its own, which begins as the embeddings."""
    model = build_llama(seed, tie_word_embeddings=False)
    model.load_state_dict(build_llama(seed, tie_word_embeddings=True).state_dict())
    return model


@pytest.mark.parametrize("carry", [(), ("lm_head",)])
def test_a_head_that_was_untied_in_training(tmp_path: Path, carry: tuple[str, ...]) -> None:
    """Of a base whose head is the embeddings: the head alone changed, and the embeddings stay."""
    build_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = fine_tune(tmp_path / "model", untied())
    done = prove_exact(
        tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), tolerance=0.0,
        inputs=Inputs(carry=carry),
    )  # fmt: skip
    assert ("lm_head" in done.modules) == (not carry)
    assert done.reading.adapter.carried.keys() == {f"{name}.weight" for name in carry}


def test_a_head_that_was_tied_in_training(tmp_path: Path) -> None:
    """Of a base with a head of its own: the difference of the head is to the model's embeddings."""
    base = untied()
    base.lm_head.weight.data += 0.05 * torch.randn(base.lm_head.weight.shape)
    base.save_pretrained(tmp_path / "base")
    model = fine_tune(tmp_path / "model", build_llama(tie_word_embeddings=True))
    done = prove_exact(tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), tolerance=0.0)
    assert done.modules["lm_head"].rank == 32


@pytest.mark.parametrize("build", [build_t5, build_bart])
def test_encoder_and_decoder_get_the_carried_embeddings(tmp_path: Path, build: Callable[[], Any]) -> None:
    """Each reads `shared` through a module of its own, and so does the head: PEFT replaces all or none."""
    from transformers import AutoModelForSeq2SeqLM

    inputs = {"input_ids": input_ids(), "labels": input_ids()}
    build().save_pretrained(tmp_path / "base")
    model = fine_tune(tmp_path / "model", build(), lambda name: is_matrix(name) or "shared" in name, inputs=inputs)
    carry = Inputs(carry=("shared", "relative") if build is build_t5 else ("shared",))
    done = converted(tmp_path / "model", tmp_path / "base", tmp_path / "out", tolerance=0.0, inputs=carry)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert len([name for name in done.reading.adapter.carried if "embed" in name or "shared" in name]) == 3
    loaded = load_on(tmp_path / "base", tmp_path / "out", auto=AutoModelForSeq2SeqLM)
    assert off_by(logits_of(loaded, **inputs), logits_of(model, **inputs)) < EXACT


def test_a_reader_of_images_is_a_causal_model(tmp_path: Path, linear: Tuned) -> None:
    """Its class is named ForConditionalGeneration, but it has no encoder."""
    shutil.copytree(linear.folder, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", architectures=["SomeForConditionalGeneration"])
    done = converted(tmp_path / "model", linear.base, tmp_path / "out", rank=1)
    assert done.reading.adapter.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("carry", [(), ("wte", "wpe", "ln_")])
def test_conv1d(tmp_path: Path, tiny_gpt2: Path, carry: tuple[str, ...]) -> None:
    """GPT-2's matrices lie as (in, out); its head is tied."""
    moved = re.compile("|".join(carry)).search if carry else is_matrix
    model = fine_tune(tmp_path / "model", build_gpt2(), lambda name: is_matrix(name) or bool(moved(name)))
    options = {"tolerance": 0.0, "inputs": Inputs(carry=carry)}
    done = prove_exact(tmp_path / "model", tiny_gpt2, tmp_path / "out", logits_of(model), **options)
    paths = [f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in
             ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    exact = {path: delta.T for path, delta in dense(tmp_path / "model", tiny_gpt2, paths).items()}
    assert done.modules.keys() == set(paths)
    after = written(tmp_path / "out", exact)
    for path, delta in exact.items():
        assert delta.shape == ((96, 32) if "c_attn" in path else after[path].shape)
        assert torch.allclose(after[path], delta, atol=1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_where_the_base_lacks_the_first_part_of_the_names(tmp_path: Path, tiny_gpt2: Path) -> None:
    """As GPT-2 on the hub: h.0.attn, where transformers writes transformer.h.0.attn."""
    shutil.copytree(tiny_gpt2, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("transformer."): one for name, one in load_file(file).items()}, file, {"format": "pt"})
    model = fine_tune(tmp_path / "model", build_gpt2())
    prove_exact(tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), tolerance=0.0)


# Precision and files


def test_bfloat16_on_bfloat16(tmp_path: Path) -> None:
    """Both models in bfloat16: their difference is exact, and float32 holds it."""
    from transformers import AutoModelForCausalLM

    build_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    fine_tune(tmp_path / "model", build_llama().to(torch.bfloat16), lr=2e-2)
    done = converted(tmp_path / "model", tmp_path / "base", tmp_path / "out", tolerance=0.0)
    exact = dense(tmp_path / "model", tmp_path / "base")
    after = written(tmp_path / "out", exact)
    for path in LINEAR:
        assert exact[path].any()
        assert float((after[path] - exact[path]).norm()) < 1e-6 * float(exact[path].norm())
    assert not any("rounding" in note for note in done.reading.notes)
    load = AutoModelForCausalLM.from_pretrained
    adapted = PeftModel.from_pretrained(load(tmp_path / "base", dtype=torch.float32), tmp_path / "out")
    assert off_by(logits_of(adapted), logits_of(load(tmp_path / "model", dtype=torch.float32))) < EXACT


def test_bfloat16_on_float32(tmp_path: Path, linear: Tuned) -> None:
    """Norms and embeddings that were only rounded are the base's own; of a matrix the rounding belongs to it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(linear.folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    done = converted(tmp_path / "model", linear.base, tmp_path / "out", tolerance=0.0)
    assert set(done.reading.known.values()) == {"the base's own, as torch.bfloat16"}
    assert "model BF16, base F32: their rounding is part of the difference" in done.reading.notes
    exact = dense(tmp_path / "model", linear.base)
    after = written(tmp_path / "out", exact)
    assert all(float((after[path] - exact[path]).norm()) < 1e-6 * float(exact[path].norm()) for path in LINEAR)


def test_a_change_below_the_rounding_of_the_base_counts(tmp_path: Path) -> None:
    """The base in bfloat16, the model in float32: what moved by 1e-4 equals the base only once it is rounded."""
    from transformers import AutoModelForCausalLM

    build_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    fine_tune(tmp_path / "model", model, lambda name: "mlp" in name)
    done = converted(tmp_path / "model", tmp_path / "base", tmp_path / "same", rank=4)
    assert done.reading.known == dict.fromkeys(OTHERS, "the base's own, as torch.float32")
    for name in (NORMS[0], "model.embed_tokens.weight"):
        model.get_parameter(name).data.mul_(1 + 1e-4)
        assert torch.equal(model.get_parameter(name).bfloat16(), tensors_of(tmp_path / "base")[name])
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="2 tensors changed") as refused:
        converted(tmp_path / "model", tmp_path / "base", tmp_path / "out", rank=4)
    assert refused.value.code == "GS-3157"
    inputs = Inputs(leave_out=("norm", "embed_tokens"))
    left = converted(tmp_path / "model", tmp_path / "base", tmp_path / "out", rank=4, inputs=inputs)
    assert sum("left out" in why for why in left.reading.known.values()) == 2  # of 6 that the names fit
    assert any("the changes of 2 tensors" in note for note in left.reading.notes)


def test_shards_give_the_same_adapter(tmp_path: Path, linear: Tuned) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(linear.folder).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    done = converted(tmp_path / "model", linear.base, tmp_path / "out", rank=2)
    assert done.root == linear.convert(tmp_path / "one", rank=2).root
    assert sorted(map(str, shards)) == list(done.receipt["inputs"]["adapter"])


def test_mixtures_of_experts(tmp_path: Path) -> None:
    """Experts are no linear layers of their own: where they or the router changed, it is said."""
    build_mixtral().save_pretrained(tmp_path / "base")
    model = fine_tune(tmp_path / "model", build_mixtral(), lambda name: "self_attn" in name)
    prove_exact(tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), tolerance=0.0)
    for part in ("experts.", "gate."):
        fine_tune(tmp_path / part, build_mixtral(), lambda name, part=part: part in name)
        with pytest.raises(InputError, match="GS-3157") as refused:
            converted(tmp_path / part, tmp_path / "base", tmp_path / "out2", tolerance=0.0)
        assert part in str(refused.value.fields["tensor"])


# Refusals


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved(folder: Path, **changes: Any) -> Path:
    build_llama(**changes).save_pretrained(folder)
    return folder


def without_a_shard(folder: Path) -> Path:
    build_llama().save_pretrained(folder, max_shard_size="60KB")
    sorted(folder.glob("model-*"))[1].unlink()
    return folder


def pickled(folder: Path) -> Path:
    saved(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def emptied(folder: Path) -> Path:
    """As a process of ZeRO-3 saves what it holds a share of."""
    file = saved(folder) / "model.safetensors"
    save_file({name: torch.zeros(0) for name in load_file(file)}, file, {"format": "pt"})
    return folder


def with_nan(folder: Path, name: str) -> Path:
    file = saved(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return folder


@dataclass(frozen=True)
class Refusal:
    """says: what the message names. build: makes the model. The rest: what `convert` is given."""

    error: type[GoraError]
    code: str
    says: str
    build: Callable[[Path], Path]
    options: Mapping[str, Any]
    inputs: Inputs = field(default_factory=Inputs)


SOME = {"tolerance": 0.1}
REFUSALS = {
    "neither": Refusal(UsageError, "GS-231", "--rank R, --tolerance T", saved, {}),
    "both": Refusal(UsageError, "GS-201", "give --rank or --tolerance", saved, {"rank": 1, "tolerance": 0.1}),
    "rank-0": Refusal(UsageError, "GS-201", "--rank", saved, {"rank": 0}),
    "tolerance-1": Refusal(UsageError, "GS-201", "--tolerance", saved, {"tolerance": 1.0}),
    "the-base": Refusal(InputError, "GS-3106", "zero", saved, SOME),
    "all-carried": Refusal(InputError, "GS-3106", "carry fewer", saved, SOME, Inputs(carry=("weight",))),
    "vocabulary": Refusal(
        BindingError, "GS-450", "400 tokens", lambda folder: saved(folder, vocab_size=400), SOME),
    "sizes": Refusal(BindingError, "GS-451", "mlp", lambda folder: saved(folder, intermediate_size=48), SOME),
    "fewer-layers": Refusal(
        InputError, "GS-3157", "the model lacks it", lambda folder: saved(folder, num_hidden_layers=1), SOME),
    "more-layers": Refusal(
        InputError, "GS-3157", "not in the base", lambda folder: saved(folder, num_hidden_layers=3), SOME),
    "shard": Refusal(MachineError, "GS-504", "model-00002-of-00003.safetensors", without_a_shard, SOME),
    "pickle": Refusal(InputError, "GS-323", "save_pretrained", pickled, SOME),
    "pickle-allowed": Refusal(InputError, "GS-323", "save_pretrained", pickled, SOME, Inputs(pickles=True)),
    "zero": Refusal(InputError, "GS-3111", "zero_to_fp32.py", emptied, SOME),
    "nan": Refusal(
        InputError, "GS-3142", "q_proj", lambda folder: with_nan(folder, f"{LLAMA_PATHS[0]}.weight"), SOME),
    "nan-norm": Refusal(
        InputError, "GS-3157", "model.norm.weight nan", lambda folder: with_nan(folder, "model.norm.weight"), SOME),
    "nan-carried": Refusal(
        InputError, "GS-3105", "model.norm.weight", lambda folder: with_nan(folder, "model.norm.weight"), SOME,
        Inputs(carry=("norm",))),
    "no-expression": Refusal(UsageError, "GS-236", "(norm", saved, SOME, Inputs(leave_out=("(norm",))),
    "no-expression-either": Refusal(UsageError, "GS-236", "--carry", saved, SOME, Inputs(carry=("*",))),
    "names-nothing": Refusal(UsageError, "GS-237", "nrom", saved, SOME, Inputs(leave_out=("norm", "nrom"))),
    "carries-nothing": Refusal(UsageError, "GS-237", "--carry", saved, SOME, Inputs(carry=("embd",))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(tmp_path: Path, tiny_base: Path, name: str) -> None:
    case = REFUSALS[name]
    model = case.build(tmp_path / "model")
    before = sorted(model.rglob("*"))
    with pytest.raises(case.error) as refused:
        converted(model, tiny_base, tmp_path / "out", inputs=case.inputs, **case.options)
    assert refused.value.code == case.code, str(refused.value)
    assert case.says in str(refused.value)
    assert list(tmp_path.iterdir()) == [model]
    assert sorted(model.rglob("*")) == before


def test_carrying_is_refused_with_an_adapter(tmp_path: Path, tiny_base: Path) -> None:
    model = train(get_peft_model(build_llama(), LoraConfig(r=2, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="GS-238"):
        converted(tmp_path / "adapter", tiny_base, tmp_path / "out", inputs=Inputs(carry=("q_proj",)))


def test_the_command_line(tmp_path: Path, whole: Tuned, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(whole.folder), "--base", str(whole.base), "--output", str(tmp_path / "out")]
    assert main([*words, "--rank", "4"]) == 3
    assert "error[GS-3157]" in capsys.readouterr().err
    assert main(words) == 3  # what LoRA cannot hold is told first
    assert main([*words, "--rank", "2", "--carry", "norm", "--leave-out", "embed", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["rank"] == 2
    assert told["tensors"]["carried"] == sorted(NORMS)
    assert list(told["tensors"]["without_effect"]) == ["model.embed_tokens.weight"]
    assert receipt_of(tmp_path / "out")["modules"] == told["modules"]
    more = [*words, "--overwrite", "--leave-out", "norm", "--leave-out", "embed"]
    assert main(more) == 2
    assert "error[GS-231]" in capsys.readouterr().err
    assert main([*more, "--tolerance", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "family full" in out
    assert 0 < receipt_of(tmp_path / "out")["error"] <= 0.5


def build_neox(seed: int = 0) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).float().eval()


def build_japanese_neox() -> Any:
    from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXJapaneseConfig(
        vocab_size=384, hidden_size=32, intermediate_multiple_size=2, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPTNeoXJapaneseForCausalLM(config).float().eval()


@pytest.mark.parametrize("carry", [(), ("embed_out",)])
def test_a_head_that_is_called_embed_out(tmp_path: Path, carry: tuple[str, ...]) -> None:
    """GPT-NeoX-Japanese calls the module so too."""
    build_japanese_neox().save_pretrained(tmp_path / "base")
    trained = ("embed_out.weight", "4h.weight")
    model = fine_tune(tmp_path / "model", build_japanese_neox(), lambda name: name.endswith(trained))
    done = prove_exact(
        tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), inputs=Inputs(carry=carry),
        tolerance=0.0,
    )  # fmt: skip
    assert ("embed_out" in done.modules) == (not carry)


@pytest.mark.parametrize("carry", [(), ("embed_out",)])
def test_a_head_whose_module_has_another_name_than_its_tensor(tmp_path: Path, carry: tuple[str, ...]) -> None:
    """GPT-NeoX: embed_out in the files, lm_head in transformers."""
    build_neox().save_pretrained(tmp_path / "base")
    model = fine_tune(
        tmp_path / "model", build_neox(), lambda name: name == "lm_head.weight" or name.endswith("dense.weight")
    )
    assert "embed_out.weight" in load_file(tmp_path / "model" / "model.safetensors")
    inputs = Inputs(carry=carry)
    prove_exact(tmp_path / "model", tmp_path / "base", tmp_path / "out", logits_of(model), inputs=inputs, tolerance=0.0)
