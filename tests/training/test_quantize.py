"""A base in 4 bits: what lies in memory, what the probe sees, and what the adapter says of it.

Oracles: NF4 written out below from its sixteen values, plain torch on a model with those weights, float64 autograd,
PEFT on the unquantized base.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_PATHS, MakeAdapter, build_gpt2, build_llama, build_t5
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gora_serve.adapter.format import read_adapter
from gora_serve.cli.render_serve import plan_summary
from gora_serve.config import (
    DataConfig,
    ExportConfig,
    FitConfig,
    Form,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    ServeConfig,
    TrainConfig,
)
from gora_serve.errors import InputError, MachineError, MismatchError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.verify import verify_adapter
from gora_serve.serving.plan import plan_server
from gora_serve.serving.served import read_served_adapters
from gora_serve.training import inject, train_stage
from gora_serve.training.data import collate, load_data
from gora_serve.training.export import export
from gora_serve.training.fit import FitResult, fit
from gora_serve.training.loss import mean_loss
from gora_serve.training.models import load_model, load_settings
from gora_serve.training.probe import probe
from gora_serve.training.probe_run import probe_only
from gora_serve.training.quantize import prepare_layers, weight_error
from gora_serve.training.targets import find_targets, linear_modules
from gora_serve.training.weights import memory_root, weight_matrix, weight_shape

NF4 = ModelConfig(dtype="float32", quantize="nf4")
QUICK = FitConfig(
    model=NF4,
    data=DataConfig(max_length=96, batch_size=4),
    probe=ProbeConfig(steps=3),
    ranks=RankConfig(rank=4),
    init=InitConfig(search_batches=1),
    train=TrainConfig(steps=3, lr=1e-3),
)
SIZES = {"hidden_size": 64, "intermediate_size": 128}
TOKENS = torch.arange(3, 43).reshape(2, 20)

# QLoRA (Dettmers et al. 2023), appendix E.
VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nf4(weight: Tensor) -> np.ndarray:
    """The nearest of the sixteen values, times the largest magnitude of each 64 values, in float64."""
    flat = weight.detach().double().numpy().reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / scales)[..., None] - VALUES).argmin(axis=-1)
    return (VALUES[nearest] * scales).reshape(-1)[: flat.size].reshape(weight.shape)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama-64"
    build_llama(**SIZES).save_pretrained(folder, max_shard_size="300KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-gpt2-64"
    build_gpt2(n_embd=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, config: ModelConfig = NF4) -> Any:
    return load_model(Base(str(folder), folder), config)


def plain_twin(model: nn.Module) -> Any:
    """An ordinary Llama in float64 with the weights of a quantized one, unpacked by this file."""
    twin = build_llama(**SIZES)
    for path in LLAMA_PATHS:
        module = twin.get_submodule(path)
        module.weight.data = torch.from_numpy(nf4(module.weight))
        assert relative(weight_matrix(model.get_submodule(path)), module.weight.numpy()) < 1e-6
    return twin.double()


def relative(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - expected) / np.linalg.norm(expected))


def run_process(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# What lies in memory


def test_weights_are_nf4_and_only_those_of_linear_layers(base: Path) -> None:
    model, original = load(base), build_llama(**SIZES)
    modules = linear_modules(model)
    assert tuple(modules) == LLAMA_PATHS
    for path, module in modules.items():
        assert module.weight.dtype == torch.uint8
        weight = original.get_submodule(path).weight
        assert weight_shape(module) == tuple(weight.shape)
        assert relative(weight_matrix(module), nf4(weight)) < 1e-6
    packed = {f"{path}.weight" for path in LLAMA_PATHS}
    for name, parameter in original.named_parameters():
        assert name in packed or torch.equal(model.get_parameter(name), parameter), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_the_weight_matrix_is_what_the_forward_pass_multiplies_by(
    base: Path, dtype: torch.dtype, training: bool
) -> None:
    """In eval mode too, where bitsandbytes would pack the weight anew and round its scales on some CPUs."""
    model = load(base, replace(NF4, dtype=str(dtype).removeprefix("torch.")))  # type: ignore[arg-type]
    before = memory_root(model)
    for path, module in linear_modules(model).items():
        module.train(training)
        with torch.no_grad():
            output = module(torch.eye(weight_shape(module)[1], dtype=dtype))
        assert output.dtype == weight_matrix(module).dtype == dtype
        assert torch.equal(output.T, weight_matrix(module)), path
    assert memory_root(model) == before


def test_forward_and_backward_agree_with_a_plain_model(base: Path) -> None:
    model = load(base)
    twin = plain_twin(model)
    assert relative(logits(model), logits(twin)) < 1e-5
    gradients = []
    for one in (model, twin):
        embedded = one.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
        one(inputs_embeds=embedded).logits.logsumexp(-1).mean().backward()
        gradients.append(embedded.grad)
    assert relative(*gradients) < 1e-5


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_statistics_agree_with_float64_autograd(base: Path, mode: Any) -> None:
    """Importance is |W_nf4 ⊙ G|, G the gradient of the quantized model."""
    model = load(base)
    batches = []
    for length in (9, 14):
        ids = torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(length))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    found = probe(
        model, batches, mean_loss, modules=linear_modules(model), rank_max=8,
        generator=torch.Generator().manual_seed(0), config=ProbeConfig(steps=2, mode=mode),
    )  # fmt: skip
    twin = plain_twin(model).requires_grad_(True)
    for batch in batches:
        (mean_loss(twin, batch) / len(batches)).backward()
    for path, module in found.modules.items():
        parameter = twin.get_submodule(path).weight
        weight, gradient = parameter.detach(), parameter.grad
        importance = float((weight * gradient).abs().mean())
        assert module.shape == tuple(weight.shape)
        assert module.importance["sensitivity"] == pytest.approx(importance, rel=1e-5 if mode == "exact" else 0.1), path
        assert relative(module.compressed, gradient @ module.A.double().T) < 1e-5, path
        assert module.A.dtype == module.compressed.dtype == torch.float32


@pytest.mark.parametrize("part", ["packed", "absmax", "code"])
def test_a_change_of_bytes_or_scales_is_noticed(base: Path, part: str) -> None:
    model = load(base)
    before = memory_root(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    tensor = {"packed": weight.data, "absmax": weight.quant_state.absmax, "code": weight.quant_state.code}[part]
    tensor.view(-1)[7] = tensor.view(-1)[8] + 1
    assert memory_root(model) != before


# Shapes and dtypes


def test_a_shape_is_right_or_refused(tiny_base: Path) -> None:
    """Rows of 32 values share a block of 64: bitsandbytes mixes their scales up on CPUs with AVX-512."""
    try:
        model = load(tiny_base)
    except MachineError as err:
        found: Any = err.code
    else:
        weight = build_llama().model.layers[0].mlp.up_proj.weight
        found = relative(weight_matrix(model.model.layers[0].mlp.up_proj), nf4(weight)) < 1e-6
    assert found in ("GS-531", True)


def test_a_kernel_that_unpacks_wrongly_is_found(base: Path) -> None:
    model = load(base)
    prepare_layers(model, base)
    for module in linear_modules(model).values():  # now the definition differs from the kernel's own table
        module.weight.quant_state.code = module.weight.quant_state.code.flip(0)
    with pytest.raises(MachineError) as caught:
        prepare_layers(model, base)
    assert caught.value.code == "GS-531"


@pytest.mark.parametrize(("asked", "stored", "expected"), [
    ("auto", torch.float32, torch.float32),
    ("auto", torch.bfloat16, torch.bfloat16),
    ("float32", torch.bfloat16, torch.float32),
    ("bfloat16", torch.float32, torch.bfloat16),
])  # fmt: skip
def test_layers_compute_in_the_dtype_that_was_chosen(
    tmp_path: Path, asked: Any, stored: torch.dtype, expected: torch.dtype
) -> None:
    build_llama(**SIZES).to(stored).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", ModelConfig(dtype=asked, quantize="nf4"))
    assert {module.compute_dtype for module in linear_modules(model).values()} == {expected}  # type: ignore[comparison-overlap]
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == expected
    weight = build_llama(**SIZES).to(stored).to(expected).model.layers[0].mlp.up_proj.weight
    found = weight_matrix(model.model.layers[0].mlp.up_proj)
    assert relative(found.float(), nf4(weight)) < (1e-6 if expected == torch.float32 else 2**-9)


def test_a_base_that_is_stored_quantized_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    load(base).save_pretrained(folder)
    assert "quantization_config" in read(folder / "config.json")
    with pytest.raises(InputError) as caught:
        load_settings(Base("quantized", folder))
    assert caught.value.code == "GS-391"


# LoRA layers on it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attach_extract_and_detach(base: Path, make_adapter: MakeAdapter, dtype: Any) -> None:
    model = load(base, replace(NF4, dtype=dtype))
    before, plain = memory_root(model), logits(model)
    ranks = {path: (1, 3, 8)[index % 3] for index, path in enumerate(LLAMA_PATHS[:-1])}
    adapter = make_adapter(ranks, shapes={path: weight_shape(model.get_submodule(path)) for path in ranks})
    attached = inject.attach(model, adapter.modules, task_type="CAUSAL_LM", fan_in_fan_out=False)
    trainable = [parameter for parameter in attached.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(ranks)
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    if dtype == "float32":
        twin = plain_twin(load(base))
        for path, factors in adapter.modules.items():
            twin.get_submodule(path).weight.data += factors.delta()
        assert relative(logits(attached.eval()), logits(twin)) < 1e-5
    attached.train()
    attached(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trainable)
    back = inject.extract(attached, base=adapter.base, origin={}, task_type="CAUSAL_LM", fan_in_fan_out=False)
    for path, factors in adapter.modules.items():
        assert torch.equal(back.modules[path].A, factors.A)
        assert torch.equal(back.modules[path].B, factors.B)
    detached = inject.detach(attached)
    assert memory_root(detached) == before
    assert torch.equal(logits(detached), plain)


# fit, from end to end


@pytest.fixture(scope="module")
def finished(base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    output = tmp_path_factory.mktemp("runs") / "run"
    return fit(str(base), str(tiny_data), output, QUICK, eval_data=str(tiny_data))


def plain_error(paths: tuple[str, ...]) -> float:
    original = build_llama(**SIZES)
    errors = []
    for path in paths:
        weight = original.get_submodule(path).weight.numpy()
        errors.append(np.linalg.norm(weight - nf4(torch.from_numpy(weight))) / np.linalg.norm(weight))
    return float(np.mean(errors))


def test_every_file_says_which_base_was_trained_on(finished: FitResult, tmp_path: Path, base: Path) -> None:
    run = read(finished.folder / "run.json")
    record = run["base"]["trained_on"]
    assert record == finished.quantization
    assert {key: record[key] for key in ("quantize", "blocksize", "double_quant", "compute_dtype", "modules")} == {
        "quantize": "nf4", "blocksize": 64, "double_quant": False, "compute_dtype": "float32", "modules": 14,
    }  # fmt: skip
    assert record["bitsandbytes"] == bitsandbytes.__version__
    assert record["memory_root"] == run["memory_root"] == run["base_after"]["memory_root"] == memory_root(load(base))
    assert record["weight_error"] == pytest.approx(plain_error(LLAMA_PATHS), rel=1e-4)
    assert run["config"]["model"]["quantize"] == "nf4"
    assert read(finished.folder / "probe" / "probe.json")["base"] == run["base"]
    for form in ("unit", "padded", "native"):
        _check_export(finished, tmp_path / form, form, record, base)


def _check_export(finished: FitResult, folder: Path, form: Form, record: Any, base: Path) -> None:
    export(finished.folder, folder, ExportConfig(form=form))
    seal = read(folder / "gora_manifest.json")
    assert json.loads(read_adapter(folder).origin["trained_on"]) == record
    assert json.loads(seal["training"]["trained_on"]) == record
    assert seal["binding"]["weights_root"] == read(finished.folder / "run.json")["base"]["roots"]["weights"]
    verified = verify_adapter(folder, base=base)
    assert (verified.trained_on, verified.warnings) == (record, ())
    assert "trained on the base quantized to nf4, mean relative weight error 9." in (folder / "README.md").read_text()
    (served,) = read_served_adapters([("colors", folder)])
    assert served.trained_on == record


def test_an_adapter_of_an_unquantized_base_says_nothing(base: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = replace(QUICK, model=replace(NF4, quantize="none"), init=InitConfig(gamma=0.1))
    result = fit(str(base), str(tiny_data), tmp_path / "run", config)
    export(result.folder, tmp_path / "adapter")
    assert result.quantization is None
    assert "trained_on" not in read(result.folder / "run.json")["base"]
    assert "trained_on" not in read_adapter(tmp_path / "adapter").origin
    assert verify_adapter(tmp_path / "adapter").trained_on is None
    assert "quantized" not in (tmp_path / "adapter" / "README.md").read_text()


def test_the_losses_are_those_of_the_quantized_base(
    finished: FitResult, base: Path, tokenizer: Any, tiny_data: Path
) -> None:
    """base: of the weights in 4 bits, by transformers; and training lowers it."""
    rows = load_data(str(tiny_data), tokenizer, QUICK.data).examples
    losses, tokens = 0.0, 0
    twin = plain_twin(load(base))
    for row in rows:
        batch = collate([row], tokenizer.pad_token_id)
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            losses += float(twin(**batch).loss) * count
        tokens += count
    assert finished.losses["base"] == pytest.approx(losses / tokens, rel=1e-4)
    assert finished.losses["end"] < finished.losses["start"] < finished.losses["base"]


def test_peft_loads_the_adapter_on_the_unquantized_base(finished: FitResult, base: Path, tmp_path: Path) -> None:
    export(finished.folder, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    edited = build_llama(**SIZES).double()
    for path, factors in finished.adapter.modules.items():
        edited.get_submodule(path).weight.data += factors.delta()
    assert relative(logits(model.eval()), logits(edited)) < 1e-5
    assert relative(logits(edited), logits(build_llama(**SIZES))) > 1e-3


def test_the_same_run_gives_the_same_adapter(finished: FitResult, base: Path, tiny_data: Path, tmp_path: Path) -> None:
    again = fit(str(base), str(tiny_data), tmp_path / "run", QUICK, eval_data=str(tiny_data))
    name = "adapter/adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_a_scale_that_changes_in_training_is_an_error(
    base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(model: Any, *args: Any, **options: Any) -> None:
        model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.quant_state.absmax[3] *= 1.5

    monkeypatch.setattr(train_stage, "train", train)
    with pytest.raises(MismatchError) as caught:
        fit(str(base), str(tiny_data), tmp_path / "run", replace(QUICK, init=InitConfig(gamma=0.1)))
    assert caught.value.code == "GS-110"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "train",
    [TrainConfig(steps=2, gradient_checkpointing=True), TrainConfig(steps=2, method="lora")],
    ids=["checkpointing", "lora"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_settings_of_training(base: Path, tiny_data: Path, tmp_path: Path, train: TrainConfig, dtype: Any) -> None:
    config = replace(QUICK, model=replace(NF4, dtype=dtype), train=train, init=InitConfig(gamma=0.1))
    result = fit(str(base), str(tiny_data), tmp_path / "run", config)
    assert result.quantization is not None
    assert result.quantization["compute_dtype"] == dtype
    tensors = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_gora_pro_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fit("nowhere", "nothing", tmp_path / "run", replace(QUICK, probe=ProbeConfig(lr=0.1)))
    assert "GoRA-pro" in caught.value.what


def test_targets_and_probe(base: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = replace(QUICK, model=replace(NF4, targets="attention"))
    statistics = probe_only(str(base), str(tiny_data), tmp_path / "probe", config, rank_max=8)
    attention = tuple(path for path in LLAMA_PATHS if "self_attn" in path)
    assert tuple(statistics.modules) == attention
    record = read(tmp_path / "probe" / "probe.json")["base"]["trained_on"]
    assert record["weight_error"] == pytest.approx(plain_error(attention), rel=1e-4)


def test_the_command_line_says_it(base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """In a process of its own: Accelerate settles the mixed precision once for a process."""
    words = ["fit", base, "--data", tiny_data, "--output", tmp_path / "run", "--quantize", "nf4", "--steps", "2"]
    words += ["--max-length", "96", "--probe-steps", "2", "--batch-size", "4", "--rank", "2"]
    words += ["--mixed-precision", "bf16"]
    done = run_process("-m", "gora_serve", *words)
    assert done.returncode == 0, done.stderr
    assert "trained on the base quantized to nf4, mean relative weight error 9." in done.stdout
    assert "kernels" not in done.stderr
    done = run_process("-m", "gora_serve", "verify", tmp_path / "run", "--base", base)
    assert "trained on the base quantized to nf4" in done.stdout


def test_a_plan_to_serve_shows_it(finished: FitResult, base: Path) -> None:
    adapters = read_served_adapters([("colors", finished.folder / "adapter")])
    summary = plan_summary(plan_server(base, adapters, ServeConfig(device="cpu")))
    assert summary.value["trained_on"] == {"colors": finished.quantization}
    assert any(line.startswith("# colors: trained on the base quantized to nf4") for line in summary.lines)


# GPT-2: transformers quantizes a Conv1D's weight the other way round


def test_conv1d_is_turned_and_the_adapter_fits_the_original(gpt2: Path, tiny_data: Path, tmp_path: Path) -> None:
    model, original = load(gpt2), build_gpt2(n_embd=64)
    modules = find_targets(model, "all-linear")
    assert len(modules) == 8
    for path, module in modules.items():
        assert relative(weight_matrix(module), nf4(original.get_submodule(path).weight.T)) < 1e-6
    result = fit(str(gpt2), str(tiny_data), tmp_path / "run", QUICK)
    assert result.quantization is not None
    assert result.quantization["weight_error"] == pytest.approx(0.09, abs=0.01)
    export(result.folder, tmp_path / "adapter")
    assert read(tmp_path / "adapter" / "adapter_config.json")["fan_in_fan_out"] is True
    plain = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    found = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    edited = copy.deepcopy(original).double()
    for path, factors in result.adapter.modules.items():
        edited.get_submodule(path).weight.data += factors.delta().T
    assert relative(logits(found), logits(edited)) < 1e-5


def test_a_weight_stored_under_another_prefix_counts(gpt2: Path, tmp_path: Path) -> None:
    """The first GPT-2 files lack the leading `transformer.`."""
    modules = find_targets(load(gpt2), "all-linear")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(gpt2 / "model.safetensors").items()}
    save_file(tensors, tmp_path / "short.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    expected = weight_error(modules, {"model": gpt2 / "model.safetensors"})
    assert expected is not None
    assert weight_error(modules, {"model": tmp_path / "short.safetensors"}) == expected
    assert weight_error(modules, {"model": tmp_path / "other.safetensors"}) is None


# T5: transformers keeps some of its layers out of the quantization


def test_an_encoder_decoder(tiny_data: Path, pair_tokenizer: Any, tmp_path: Path) -> None:
    """T5's wo stays as it was; it is a target all the same."""
    original = build_t5(d_model=64, d_kv=32, d_ff=128)
    original.save_pretrained(tmp_path / "base")
    pair_tokenizer.save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    modules = find_targets(model, "all-linear")
    assert tuple(modules) == tuple(linear_modules(original))
    plain = [path for path, module in modules.items() if module.weight.dtype == torch.float32]
    assert plain == [path for path in modules if path.endswith(".wo")]
    for path, module in modules.items():
        weight = original.get_submodule(path).weight
        expected = weight.numpy() if path in plain else nf4(weight)
        assert relative(weight_matrix(module), expected) < 1e-6, path
    result = fit(str(tmp_path / "base"), str(tiny_data), tmp_path / "run", replace(QUICK, init=InitConfig(gamma=0.1)))
    assert result.quantization is not None
    assert result.quantization["modules"] == len(modules) - len(plain)
    assert set(result.adapter.modules) == set(modules)


# Without bitsandbytes

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from gora_serve.cli.main import run
sys.argv = ["gora-serve", *sys.argv[1:]]
run()
"""


def test_without_bitsandbytes_the_extra_is_named(base: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = ["fit", base, "--data", tiny_data, "--output", tmp_path / "run", "--quantize", "nf4"]
    done = run_process("-c", BLOCKED, *words)
    assert done.returncode == 5, done.stderr
    assert "error[GS-530]" in done.stderr
    assert "pip install 'gora-serve[quantize]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_base_without_linear_layers_to_quantize_is_refused(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    with pytest.raises(InputError) as caught:
        prepare_layers(build_llama(), folder)
    assert caught.value.code == "GS-390"
