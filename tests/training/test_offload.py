"""--offload: the same numbers, bit for bit, with the weights on the CPU or on disk, and the base's files only read."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import build_llama, build_mixtral, color_rows, write_jsonl
from torch import nn
from transformers import LlamaForCausalLM

from gora_serve.adapter.factors import LoraFactors
from gora_serve.config import (
    DataConfig,
    FitConfig,
    InitConfig,
    ModelConfig,
    Offload,
    ProbeConfig,
    RankConfig,
    TrainConfig,
)
from gora_serve.errors import InputError, MachineError, UsageError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.training import inject
from gora_serve.training.fit import fit
from gora_serve.training.loop import make_optimizer, train
from gora_serve.training.loss import mean_loss
from gora_serve.training.models import load_model
from gora_serve.training.offload import offload
from gora_serve.training.probe_run import probe_only
from gora_serve.training.targets import find_targets
from gora_serve.training.weights import memory_root, weight_matrix

CPU = torch.device("cpu")
AWAY: tuple[Offload, ...] = ("cpu", "disk")
CONFIG = FitConfig(
    model=ModelConfig(dtype="float32"),
    data=DataConfig(max_length=96, batch_size=4),
    probe=ProbeConfig(steps=3),
    ranks=RankConfig(rank=4),
    init=InitConfig(gamma="auto", search_batches=1),
    train=TrainConfig(steps=3, lr=1e-3),
)


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Llama in bfloat16 whose head is its embedding: what small models are."""
    folder = tmp_path_factory.mktemp("bases") / "tied"
    build_llama(tie_word_embeddings=True).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Every file of a run but run.json and metrics.jsonl, which hold times."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.json", "metrics.jsonl")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def numbers(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files, so that what is left there shows."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tiny_base", "float32"), ("tiny_gpt2", "auto"), ("tied_base", "bfloat16"), ("tied_base", "float32"),
        ("tiny_t5", "auto"), ("tiny_bart", "auto"),
    ],
)  # fmt: skip
def test_a_run_is_the_same_bit_for_bit(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path, scratch: Path, name: str, dtype: Any
) -> None:
    base: Path = request.getfixturevalue(name)
    before = digests(base)
    held_out = write_jsonl(tmp_path / "eval.jsonl", color_rows(50)[40:])
    # Checkpointing an encoder-decoder sums the gradients of the encoder's output in another order: so in all three.
    train = replace(CONFIG.train, gradient_checkpointing=name in ("tiny_t5", "tiny_bart"))
    config = replace(CONFIG, model=ModelConfig(dtype=dtype), train=train)
    roots, losses = [], []
    for where in ("none", *AWAY):
        moved = replace(config, model=replace(config.model, offload=where))
        result = fit(str(base), str(tiny_data), tmp_path / where, moved, eval_data=str(held_out))
        roots.append(json.loads((tmp_path / where / "run.json").read_text())["memory_root"])
        losses.append(result.losses)
    assert digests(tmp_path / "cpu") == digests(tmp_path / "disk") == digests(tmp_path / "none")
    assert numbers(tmp_path / "cpu") == numbers(tmp_path / "disk") == numbers(tmp_path / "none")
    assert losses[0] == losses[1] == losses[2]
    assert len(set(roots)) == 1
    assert digests(base) == before


def test_checkpointing_alone_changes_no_number(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Offload brings it along; without it the resident run has the same losses."""
    for name, on in (("off", False), ("on", True)):
        config = replace(CONFIG, train=replace(CONFIG.train, gradient_checkpointing=on))
        fit(str(tiny_base), str(tiny_data), tmp_path / name, config)
    assert numbers(tmp_path / "on") == numbers(tmp_path / "off")


@pytest.mark.parametrize("where", AWAY)
def test_a_probe_is_the_same_bit_for_bit(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, scratch: Path, where: Offload
) -> None:
    for name in ("none", where):
        config = replace(CONFIG, model=replace(CONFIG.model, offload=name), probe=ProbeConfig(steps=2, mode="sketch"))  # type: ignore[arg-type]
        probe_only(str(tiny_base), str(tiny_data), tmp_path / name, config, rank_max=8)
    assert digests(tmp_path / where) == digests(tmp_path / "none")


def away(base: Path, where: Offload, **config: Any) -> Any:
    settings = ModelConfig(offload=where, **config)
    model = load_model(locate_base(str(base)), settings)
    offload(model, where, CPU)
    return model


@pytest.mark.parametrize("where", AWAY)
def test_weights_are_those_of_the_files_and_nothing_is_resident(tied_base: Path, where: Offload) -> None:
    stored = load_file(tied_base / "model.safetensors")
    model = away(tied_base, where)
    assert all(parameter.is_meta for parameter in model.parameters())
    for path, module in find_targets(model, "all-linear").items():
        assert torch.equal(weight_matrix(module), stored[f"{path}.weight"])
    assert memory_root(model) == memory_root(load_model(locate_base(str(tied_base)), ModelConfig()))
    other = build_llama(seed=1, tie_word_embeddings=True).bfloat16()
    assert memory_root(model) != memory_root(other)


class Peak:
    """How many bytes of offloaded weights were there at once, at most, when any layer began to run."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bytes = model, 0
        self.base = [p for n, p in model.named_parameters() if "lora_" not in n]
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(self.look)

    def look(self, module: nn.Module, inputs: Any) -> None:
        there = [p for n, p in self.model.named_parameters() if "lora_" not in n and not p.is_meta]
        self.bytes = max(self.bytes, sum(p.numel() * p.element_size() for p in there))


def a_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize("where", AWAY)
def test_weights_go_away_again_in_the_backward_pass(tiny_base: Path, where: Offload) -> None:
    """Also where a layer's recomputation ends with a frozen weight: there checkpointing would stop early."""
    model = away(tiny_base, where)
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"model.layers.{layer}.self_attn.q_proj": LoraFactors(
            torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator), 1.0
        )
        for layer in (0, 1)
    }
    peft_model = inject.attach(model, factors, task_type="CAUSAL_LM", fan_in_fan_out=False).train()
    peak = Peak(peft_model)
    mean_loss(peft_model, a_batch()).backward()  # type: ignore[no-untyped-call]
    left = [n for n, p in peft_model.named_parameters() if "lora_" not in n and not p.is_meta]
    assert left == []
    largest = max(p.numel() * p.element_size() for p in peft_model.parameters())
    assert peak.bytes <= largest


@pytest.mark.parametrize("where", AWAY)
def test_factors_are_real_float32_and_detaching_gives_the_base_back(tied_base: Path, where: Offload) -> None:
    """PEFT puts new factors where the base's weight is: without memory. Copied there, values would be lost."""
    model, batch = away(tied_base, where), a_batch()
    with torch.no_grad():
        before = model(batch["input_ids"]).logits
    targets = find_targets(model, "all-linear")
    generator = torch.Generator().manual_seed(0)
    factors = {
        path: LoraFactors(
            torch.randn(2, m.in_features, generator=generator), torch.randn(m.out_features, 2, generator=generator), 0.5
        )
        for path, m in targets.items()
    }
    peft_model = inject.attach(model, factors, task_type="CAUSAL_LM", fan_in_fan_out=False)
    held = [p for group in make_optimizer(peft_model, TrainConfig()).param_groups for p in group["params"]]
    assert len(held) == 2 * len(targets)
    assert {(p.dtype, p.device) for p in held} == {(torch.float32, CPU)}
    for path, layer in inject.lora_layers(peft_model).items():
        assert torch.equal(layer.lora_A["default"].weight, factors[path].A)
        assert torch.equal(layer.lora_B["default"].weight, factors[path].B)
    train(
        peft_model, [lambda: batch], accelerator=Accelerator(), config=TrainConfig(lr=0.1), record=lambda _: None,
        after_step=lambda _: None, listen=lambda _: None,
    )  # fmt: skip
    with torch.no_grad():
        assert not torch.equal(peft_model(batch["input_ids"]).logits, before)
    base = inject.detach(peft_model)
    assert base is model
    assert not inject_traces(base)
    assert all(parameter.is_meta for parameter in base.parameters())
    with torch.no_grad():
        assert torch.equal(base.eval()(batch["input_ids"]).logits, before)


def inject_traces(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if "lora" in name or "base_layer" in name]


def test_the_temporary_folder_goes_with_the_model(tiny_base: Path, scratch: Path) -> None:
    model = away(tiny_base, "disk")
    assert [path.name.startswith("gora-serve-offload-") for path in scratch.iterdir()] == [True]
    assert not any(path.is_file() for path in scratch.rglob("*")), "weights that need no conversion are not copied"
    del model
    import gc

    gc.collect()
    assert list(scratch.iterdir()) == []


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_converted_weights_that_do_not_fit_are_named(tmp_path: Path, scratch: Path) -> None:
    base = Base("mixtral", tmp_path / "base")
    build_mixtral().save_pretrained(base.path)
    with no_file_above(4096), pytest.raises(MachineError) as caught:
        load_model(base, ModelConfig(offload="disk"))
    assert caught.value.code == "GS-527"
    assert str(caught.value.fields["file"]).startswith(str(scratch))
    assert list(scratch.iterdir()) == []
    with torch.no_grad():
        load_model(base, ModelConfig(offload="disk"))(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-64])])
def test_a_base_that_goes_away_during_the_run_is_named(
    tiny_base: Path, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    model = away(folder, "disk")
    harm(folder / "model-00002-of-00002.safetensors")
    with torch.no_grad(), pytest.raises(MachineError) as caught:
        model(torch.tensor([[1, 2]]))
    assert caught.value.code == "GS-528"
    assert str(caught.value.fields["file"]).endswith("model-00002-of-00002.safetensors")
    assert caught.value.fields["tensor"]


def test_weights_of_other_shapes_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    """They are read when they are used, so transformers does not see them."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InputError, match="GS-349") as caught:
        away(folder, "disk")
    assert "[384, 32]" in str(caught.value.fields["actual"])


def test_a_model_without_checkpointing_is_refused() -> None:
    with pytest.raises(UsageError, match="GS-221"):
        offload(nn.Sequential(nn.Linear(2, 2)), "cpu", CPU)


class HeadByHand(LlamaForCausalLM):  # type: ignore[misc]
    """Computes its logits from the head's weight, without running the head."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = self.model(input_ids).last_hidden_state
        return nn.functional.linear(hidden, self.lm_head.weight)


def test_a_model_that_uses_a_weight_elsewhere_is_refused() -> None:
    """Torch would compute with memory that nobody has written: no error, wrong numbers."""
    model = HeadByHand(build_llama().config)
    with pytest.raises(UsageError, match="GS-222"):
        offload(model, "cpu", CPU)


def test_exploratory_steps_and_offload_are_refused_together() -> None:
    config = replace(CONFIG, model=ModelConfig(offload="cpu"), probe=ProbeConfig(lr=0.1))
    with pytest.raises(UsageError, match="GS-201"):
        config.validate()
