"""The plan against real models: parameters on the meta device, and what autograd really saves, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_gpt2, build_llama, build_t5
from torch import nn

from gora_serve.adapter.factors import LoraFactors
from gora_serve.config import DataConfig, ModelConfig, PlanConfig, RankConfig
from gora_serve.errors import GoraError
from gora_serve.gora.ranks import lora_parameters
from gora_serve.integrity.bases import locate_base
from gora_serve.training import inject
from gora_serve.training.activations import Job, Pass
from gora_serve.training.advice import advise, free_memory, least
from gora_serve.training.autocast import autocast
from gora_serve.training.loss import mean_loss
from gora_serve.training.memory import JOBS, OFFLOADS, MemoryPlan, chosen_targets, estimate
from gora_serve.training.models import load_model
from gora_serve.training.shapes import BaseShapes, read_shapes
from gora_serve.training.taps import tapped
from gora_serve.training.targets import find_targets
from gora_serve.training.weights import weight_shape

DOCS = Path(__file__).parent.parent.parent / "docs"
LLAMA = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
# What differs between two kinds and could be got wrong: biases, norms of heads, tied heads, other sizes of a head.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "model_type": "llama"},
    "llama-tied": {**LLAMA, "model_type": "llama", "tie_word_embeddings": True, "head_dim": 16},
    "llama-biases": {**LLAMA, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**LLAMA, "model_type": "mistral"},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3"},
    "gemma": {**LLAMA, "model_type": "gemma"},
    "gemma2": {**LLAMA, "model_type": "gemma2"},
}
FROM_CONFIG = [name for name in CONFIGS if not name.startswith("gemma")]


def build(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    config = AutoConfig.for_model(CONFIGS[name]["model_type"], **settings)
    return AutoModelForCausalLM.from_config(config).float().requires_grad_(False).eval()


def saved(model: Any, folder: Path) -> BaseShapes:
    model.save_pretrained(folder)
    return read_shapes(folder)


def config_only(folder: Path, config: dict[str, Any]) -> BaseShapes:
    (folder / "config.json").write_text(json.dumps(config))
    return read_shapes(folder)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_targets_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    shapes = saved(model, tmp_path)
    assert shapes.parameters == parameters(model)
    found = {path: tuple(module.weight.shape) for path, module in find_targets(model, "all-linear").items()}
    assert chosen_targets(shapes, "all-linear") == found
    for targets in ("attention", "q_proj,down_proj", r".*\.1\..*_proj"):
        assert set(chosen_targets(shapes, targets)) == set(find_targets(model, targets))
    assert shapes.blocks == 3


@pytest.mark.parametrize("name", FROM_CONFIG)
def test_shapes_from_the_configuration_are_those_of_the_headers(name: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "bare").mkdir()
    whole = saved(build(name), tmp_path / "whole")
    bare = config_only(tmp_path / "bare", json.loads((tmp_path / "whole" / "config.json").read_text()))
    assert dict(bare.tensors) == dict(whole.tensors)
    assert bare.linears == whole.linears


@pytest.mark.parametrize(("build_model", "blocks"), [(build_gpt2, 2), (build_t5, 4)])
def test_other_architectures(build_model: Any, blocks: int, tmp_path: Path) -> None:
    model = build_model()
    shapes = saved(model, tmp_path)
    assert shapes.parameters == parameters(model)
    targets = find_targets(model, "all-linear")
    turned = {p: tuple(m.weight.T.shape) if hasattr(m, "nf") else tuple(m.weight.shape) for p, m in targets.items()}
    assert chosen_targets(shapes, "all-linear") == turned
    assert set(chosen_targets(shapes, "attention")) == set(find_targets(model, "attention"))
    assert shapes.blocks == blocks == shapes.settings.layers


def test_gpt2_without_the_prefix_and_with_buffers(tmp_path: Path) -> None:
    """As on the hub: names without "transformer.", and masks among the tensors."""
    from safetensors.torch import load_file, save_file

    model = build_gpt2()
    model.save_pretrained(tmp_path)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    save_file(tensors, tmp_path / "model.safetensors")
    shapes = read_shapes(tmp_path)
    assert shapes.parameters == parameters(model)
    assert set(shapes.linears) == set(find_targets(model, "all-linear"))


def test_experts_are_counted_and_are_no_targets(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    model = MixtralForCausalLM(MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=2))
    shapes = saved(model, tmp_path)
    assert shapes.parameters == parameters(model)
    assert set(shapes.linears) == set(find_targets(model, "all-linear"))
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert shapes.experts == inside > 0
    assert estimate(shapes, PlanConfig()).experts == inside


def saved_bytes(model: nn.Module, batch: dict[str, torch.Tensor], forward: Any, without: int) -> int:
    """The bytes that autograd saves beside the model's own, each storage once, and tensors of `without` columns not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.shape[-1:] != (without,):
            found[place] = tensor  # holds the storage, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def prepared(model: Any, job: Job, rank: int) -> tuple[Any, contextlib.AbstractContextManager[None]]:
    """The model as the job has it: tapped, or with LoRA layers."""
    modules = find_targets(model, "all-linear")
    if job != "train":
        return model, tapped(modules, {path: lambda dY, X: None for path in modules})
    conv = any(hasattr(module, "nf") for module in modules.values())
    shapes = {path: weight_shape(module) for path, module in modules.items()}
    factors = {p: LoraFactors(torch.ones(rank, i), torch.zeros(o, rank), 1.0) for p, (o, i) in shapes.items()}
    return inject.attach(model, factors, task_type=None, fan_in_fan_out=conv), contextlib.nullcontext()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("job", ["probe exact", "train"])
@pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "t5"])
def test_activations_are_what_autograd_saves(
    name: str, job: Job, dtype: torch.dtype, padded: bool, tmp_path: Path
) -> None:
    builders = {"gpt2": build_gpt2, "t5": build_t5}
    model = builders[name]() if name in builders else build(name)
    shapes = saved(model, tmp_path)
    rows, length, rank = 2, 48, 4
    model = model.to(dtype)
    model, context = prepared(model, job, rank)
    ids = torch.randint(5, 90, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if padded or name == "t5":  # without padding T5 has one bias for all rows; the plan takes the padded case
        batch["attention_mask"][0, -5:] = 0
    forward = (lambda model, batch: model(**batch)) if name == "t5" else mean_loss
    with context:
        found = saved_bytes(model, batch, forward, shapes.settings.vocabulary)
    one = Pass(job, shapes.settings, dtype.itemsize, length, padded, shapes.linears, rank)
    assert one.all_blocks() * rows * length == pytest.approx(found, rel=0.06)


@pytest.mark.parametrize(("stored", "rank"), [("float32", 4), ("float32", 32), ("bfloat16", 4)])
@pytest.mark.parametrize("job", ["probe exact", "train"])
@pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "t5"])
def test_autocast_saves_narrower_numbers_and_copies_of_the_weights(
    name: str, job: Job, stored: Any, rank: int, tmp_path: Path
) -> None:
    """Planned: the copies of all layers, of which those are not made before which nothing needs a gradient."""
    builders = {"gpt2": build_gpt2, "t5": build_t5}
    model = builders[name]() if name in builders else build(name)
    shapes = saved(model.to(getattr(torch, stored)), tmp_path)
    config = PlanConfig(ModelConfig(dtype=stored), DataConfig(48, batch_size=2), RankConfig(rank))
    check_autocast(model, shapes, config, job)
    linear = sum(out * inside for out, inside in shapes.linears.values())
    added = autocast(shapes, replace(config, mixed_precision="bf16"), job, 0)
    assert added is not None
    assert added.blocks == (2 * linear if stored == "float32" else 0)


@pytest.mark.parametrize("job", ["probe exact", "train"])
def test_autocast_over_packed_weights(job: Job, tmp_path: Path) -> None:
    """bitsandbytes' layers give their input's dtype, and autograd keeps nothing of their weights."""
    pytest.importorskip("bitsandbytes")
    shapes = saved(build_llama(hidden_size=64, intermediate_size=128), tmp_path)
    chosen = ModelConfig(dtype="float32", quantize="nf4")
    model = load_model(locate_base(str(tmp_path)), chosen)
    check_autocast(model, shapes, PlanConfig(chosen, DataConfig(48, batch_size=2), RankConfig(4)), job)


def check_autocast(model: Any, shapes: BaseShapes, config: PlanConfig, job: Job) -> None:
    """Compare what autograd saves under autocast to bfloat16 with the plan's activations and copies."""
    rows, length, rank = config.data.batch_size, config.data.max_length, config.ranks.rank
    model, context = prepared(model, job, rank)
    ids = torch.randint(5, 90, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["attention_mask"][0, -5:] = 0
    forward = (lambda model, batch: model(**batch)) if shapes.settings.kind == "t5" else mean_loss
    with context, torch.autocast("cpu", torch.bfloat16):
        found = saved_bytes(model, batch, forward, shapes.settings.vocabulary)
    config = replace(config, mixed_precision="bf16")
    added = autocast(shapes, config, job, lora_parameters(shapes.linears, rank))
    assert added is not None
    need = estimate(shapes, config).need(job, "none", checkpointing=False).device
    assert need.copies == (added.at_logits if need.logits else added.in_block)(checkpointing=False)
    one = Pass(
        job, shapes.settings, 4 if config.model.dtype == "float32" else 2, length, True, shapes.linears, rank,
        autocast=2, packed=config.model.quantize == "nf4",
    )  # fmt: skip
    planned = one.all_blocks() * rows * length + added.in_block(checkpointing=False)
    assert planned == pytest.approx(found, rel=0.06)


def test_copies_are_made_where_weights_have_another_dtype(llama: BaseShapes) -> None:
    head = 2 * math.prod(llama.tensors["lm_head.weight"])
    factors = 2 * lora_parameters(llama.linears, 8)
    block = sum(2 * o * i for path, (o, i) in llama.linears.items() if path.startswith("model.layers.0."))

    def copies(job: Job, **changes: Any) -> set[int]:
        plan = plan_of(llama, **changes)
        return {plan.need(job, "none", checkpointing=True).device.copies}

    stages = {head + factors, block}
    assert copies("train", mixed_precision="bf16") <= stages
    assert copies("probe exact", mixed_precision="bf16") <= {head, block}
    assert copies("train", mixed_precision="bf16", model=ModelConfig(dtype="bfloat16")) <= {factors, 0}
    assert copies("train", mixed_precision="fp16", model=ModelConfig(dtype="bfloat16")) <= stages
    assert copies("train", mixed_precision="bf16", model=ModelConfig(quantize="nf4")) <= {head + factors, 0}
    for job in JOBS:
        assert copies(job) == {0}
        assert copies(job, mixed_precision="fp16", device="cpu") == {0}, "Accelerate has no float16 on CPUs"
    assert copies("probe exact", mixed_precision="fp16") == {0}, "a probe has no loss scaling"
    without, fp16 = plan_of(llama), plan_of(llama, mixed_precision="fp16")
    assert without.need("probe exact", "cpu", checkpointing=True) == fp16.need("probe exact", "cpu", checkpointing=True)


def test_offloaded_weights_give_way_to_their_copies(llama: BaseShapes) -> None:
    """Autograd keeps what a layer computed with: of a block at work one weight is there, and copies of all."""
    plan = plan_of(llama, mixed_precision="bf16", data=DataConfig(64, batch_size=8))
    device = plan.need("train", "disk", checkpointing=True).device
    assert device.logits == 0, "the peak is in a block"
    assert device.weights == 4 * max(out * inside for out, inside in llama.linears.values())
    assert device.copies == sum(2 * o * i for path, (o, i) in llama.linears.items() if ".layers.0." in path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_auto_takes_is_chosen_before_any_copy_is_made(llama: BaseShapes, precision: Any) -> None:
    plans = {of: plan_of(llama, mixed_precision=of) for of in ("no", precision)}
    for memory in range(least(plans[precision]), 4 * least(plans[precision]), 2**18):
        chosen = advise(plans[precision], memory)
        assert chosen is not None
        exact = plans["no"].need("probe exact", chosen.offload, checkpointing=chosen.checkpointing).device
        fits = exact.statistics <= (memory - exact.weights - exact.fixed) / 2
        assert chosen.auto == ("exact" if fits else "sketch")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseShapes:
    return saved(build_llama(), tmp_path_factory.mktemp("llama"))


def plan_of(shapes: BaseShapes, **changes: Any) -> MemoryPlan:
    return estimate(shapes, replace(PlanConfig(), **changes))


def test_parts_of_a_tiny_model(llama: BaseShapes) -> None:
    """By hand: weights and gradients in float32, 16 bytes a trainable parameter."""
    plan = plan_of(llama)
    linear = sum(out * inside for out, inside in llama.linears.values())
    assert plan.need("probe exact", "none", checkpointing=False).device.statistics == 4 * linear
    train = plan.need("train", "none", checkpointing=False)
    assert train.device.weights == 4 * llama.parameters
    assert train.device.adapter == 16 * plan.adapter_parameters
    assert plan.adapter_parameters == sum(8 * (out + inside) for out, inside in llama.linears.values())
    halved = plan_of(llama, model=ModelConfig(dtype="bfloat16")).need("train", "none", checkpointing=False)
    assert 2 * halved.device.weights == train.device.weights


@pytest.mark.parametrize(("dtype", "device", "entry"), [
    ("bfloat16", "gpu", 2), ("bfloat16", "cpu", 6), ("float32", "gpu", 0), ("float32", "cpu", 0),
])  # fmt: skip
def test_an_exact_probe_holds_the_gradient_that_it_adds(llama: BaseShapes, dtype: Any, device: Any, entry: int) -> None:
    """Beside what a sketch holds at work in a block; in float32 it is added as it is computed."""
    plan = plan_of(llama, model=ModelConfig(dtype=dtype), device=device, data=DataConfig(64, batch_size=64))
    exact, sketch = (plan.need(job, "none", checkpointing=True).device for job in ("probe exact", "probe sketch"))
    assert exact.logits == 0, "the peak is elsewhere"
    largest = max(out * inside for out, inside in llama.linears.values())
    assert exact.activations - sketch.activations == entry * largest


def test_offload_keeps_one_block_on_the_device(llama: BaseShapes) -> None:
    """In a block's backward pass; where the logits are, it is the head alone."""
    block = 4 * sum(math.prod(s) for n, s in llama.tensors.items() if n.startswith("model.layers.0."))
    head = 4 * math.prod(llama.tensors["lm_head.weight"])
    for job in JOBS:
        on_cpu = plan_of(llama).need(job, "cpu", checkpointing=True)
        on_disk = plan_of(llama).need(job, "disk", checkpointing=True)
        assert on_cpu.device == on_disk.device
        assert on_cpu.device.weights == (head if on_cpu.device.logits else block)
        assert on_cpu.host.weights == 4 * llama.parameters
        assert on_disk.host.weights == block
    in_one = plan_of(llama, device="cpu").need("train", "cpu", checkpointing=True)
    assert in_one.device.weights == 4 * llama.parameters
    assert in_one.host.total == 0


def test_nf4_and_sharding_shrink_the_weights(llama: BaseShapes) -> None:
    linear = sum(out * inside for out, inside in llama.linears.values())
    largest = max(out * inside for out, inside in llama.linears.values())
    quantized = (
        plan_of(llama, model=ModelConfig(quantize="nf4")).need("train", "none", checkpointing=True).device.weights
    )
    assert quantized == pytest.approx(4 * (llama.parameters - linear) + linear * 4.5 / 8 + 4 * largest, rel=1e-3)
    block = sum(math.prod(s) for n, s in llama.tensors.items() if n.startswith("model.layers.0."))
    sharded = plan_of(llama, processes=2, sharded=True).need("train", "none", checkpointing=True)
    at_work = 0 if sharded.device.logits else 2
    outside = llama.parameters - 2 * block
    assert sharded.device.weights == 4 * (outside + llama.parameters // 2 + at_work * block)
    for changes in ({"processes": 2, "sharded": True}, {"model": ModelConfig(quantize="nf4")}):
        assert {need.offload for need in plan_of(llama, **changes).needs} == {"none"}


sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 16),
        "length": st.integers(2, 256),
        "rank": st.integers(1, 16),
        "processes": st.integers(1, 8),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "quantize": st.sampled_from(["none", "nf4"]),
        "device": st.sampled_from(["gpu", "cpu"]),
    }
)


def configured(size: dict[str, Any]) -> PlanConfig:
    return PlanConfig(
        ModelConfig(dtype=size["dtype"], quantize=size["quantize"]),
        DataConfig(size["length"], batch_size=size["batch"]),
        RankConfig(size["rank"]), processes=size["processes"], device=size["device"],
    )  # fmt: skip


@given(size=sizes, grown=st.sampled_from(["batch", "length", "rank", "processes"]))
def test_more_of_anything_never_takes_less(llama: BaseShapes, size: dict[str, Any], grown: str) -> None:
    before = estimate(llama, configured(size))
    after = estimate(llama, configured({**size, grown: size[grown] + 1}))
    for less, more in zip(before.needs, after.needs, strict=True):
        assert more.device.total >= less.device.total
        assert more.host.total >= less.host.total


@given(size=sizes)
def test_ways_of_saving_save(llama: BaseShapes, size: dict[str, Any]) -> None:
    plan = estimate(llama, configured({**size, "quantize": "none"}))
    for job in JOBS:
        whole = plan.need(job, "none", checkpointing=True)
        disk, cpu = plan.need(job, "disk", checkpointing=True), plan.need(job, "cpu", checkpointing=True)
        assert disk.device.total <= cpu.device.total <= whole.device.total
        assert disk.host.total <= cpu.host.total


@given(size=sizes, memory=st.integers(2**20, 2**33))
def test_advice_fits_and_is_found_where_anything_fits(llama: BaseShapes, size: dict[str, Any], memory: int) -> None:
    plan = estimate(llama, configured(size))
    advice = advise(plan, memory)
    assert (advice is not None) == (least(plan) <= memory)
    if advice:
        for job in (f"probe {advice.probe}", "train"):
            chosen = plan.need(job, advice.offload, checkpointing=advice.checkpointing)  # type: ignore[arg-type]
            assert chosen.device.total <= advice.peak.device.total <= memory


def test_advice_goes_from_fast_to_sparing(llama: BaseShapes) -> None:
    plan = plan_of(llama, data=DataConfig(256, batch_size=1))
    totals = {(n.job, n.offload, n.checkpointing): n.device.total for n in plan.needs}
    enough = max(totals.values())
    first = advise(plan, enough)
    assert first is not None
    assert (first.probe, first.offload, first.checkpointing, first.options) == (
        "exact", "none", False, ("--probe", "exact"),
    )  # fmt: skip
    for need in plan.needs:  # with room for a way of training, none more sparing is advised
        if need.job == "train":
            probe = plan.need("probe sketch", need.offload, checkpointing=need.checkpointing)
            advice = advise(plan, max(need.device.total, probe.device.total))
            assert advice is not None
            assert OFFLOADS.index(advice.offload) <= OFFLOADS.index(need.offload)
    assert least(plan) < enough


def test_tables_of_the_documentation_are_up_to_date() -> None:
    made = runpy.run_path(str(DOCS / "make_memory.py"))["page"]()
    assert (DOCS / "memory.md").read_text(encoding="utf-8") == made, "run: python docs/make_memory.py"


def test_free_memory_of_this_machine() -> None:
    device, free = free_memory("cpu")
    assert device == "cpu"
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < free <= int(total.split()[1]) * 1024


def code_of(call: Any) -> tuple[str, Literal["file"], Any]:
    with pytest.raises(GoraError) as caught:
        call()
    return caught.value.code, "file", caught.value.fields.get("file")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIGS["llama"].items() if name != key}
    with pytest.raises(GoraError, match=key) as caught:
        config_only(tmp_path, config)
    assert caught.value.code == "GS-380"
    assert caught.value.fields["file"] == tmp_path / "config.json"


@pytest.mark.parametrize("value", ["32", -1, 0, True, 1.5, [32], 2**53])
def test_a_size_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(GoraError, match="hidden_size") as caught:
        config_only(tmp_path, {**CONFIGS["llama"], "hidden_size": value})
    assert caught.value.code == "GS-380"


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    def refuse(config: Any) -> str:
        with pytest.raises(GoraError) as caught:
            config_only(tmp_path, config)
        return caught.value.code

    assert refuse({**CONFIGS["llama"], "model_type": "mamba"}) == "GS-396"
    assert refuse({"hidden_size": 32}) == "GS-396"
    assert refuse({**CONFIGS["llama"], "quantization_config": {"bits": 4}}) == "GS-396"
    assert refuse({**CONFIGS["llama"], "num_hidden_layers": 2**24}) == "GS-380"
    assert refuse([1]) == "GS-380"
    assert refuse(CONFIGS["gemma"]) == "GS-396"  # its shapes do not follow from the configuration
    (tmp_path / "pytorch_model.bin").touch()
    assert refuse(CONFIGS["llama"]) == refuse(CONFIGS["gemma"]) == "GS-323"
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert refuse(CONFIGS["llama"]) == "GS-301"


def test_settings_that_make_no_sense_are_refused(llama: BaseShapes) -> None:
    packed = {"processes": 2, "sharded": True, "model": ModelConfig(quantize="nf4")}
    for changes in (packed, {"processes": 0}, {"sharded": True}, {"data": DataConfig(1)}, {"ranks": RankConfig(0)}):
        with pytest.raises(GoraError) as caught:
            plan_of(llama, **changes)
        assert caught.value.code == "GS-201"
    for targets in ("no_such", "(", "attention|x"):
        with pytest.raises(GoraError) as caught:
            plan_of(llama, model=ModelConfig(targets))
        assert caught.value.code in ("GS-202", "GS-203")
