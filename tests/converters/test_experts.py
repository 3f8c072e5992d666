"""LoRA of a mixture's experts: one by one, as the checkpoint has them, whatever transformers and PEFT fuse.

The oracle knows nothing of adapters: what was converted is added to the base's tensors by name, and the result loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from proving import EXACT, converted, load_on, logits_of, off_by, train
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.combining import merge_adapters
from gora_serve.adapter.format import read_adapter
from gora_serve.config import MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.stacks import level
from gora_serve.errors import BindingError, GoraError, InputError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.record import WEIGHTS

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def build_qwen(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8} | changes
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).float().requires_grad_(False).eval()


def build_mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=24)
    return MixtralForCausalLM(config).float().requires_grad_(False).eval()


def build_gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, num_local_experts=4, intermediate_size=24, head_dim=8)
    return GptOssForCausalLM(config).float().requires_grad_(False).eval()


def trained(
    folder: Path, build: Callable[[], Any] = build_qwen, *, wrap: Callable[..., Any] = get_peft_model, **settings: Any
) -> Tensor:
    """Save base and trained adapter into the folder, and return the trained model's logits."""
    build().save_pretrained(folder / "base")
    targets = {"target_modules": ATTENTION, "target_parameters": EXPERTS, "r": 4, "lora_alpha": 8}
    model = train(wrap(build(), LoraConfig(**targets | settings)))
    model.save_pretrained(folder / "adapter")
    return logits_of(model)


def added(base: Path, adapter: Path, output: Path) -> Any:
    """Return the base with every update of the adapter added to the tensor of its name."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, output)
    tensors = load_file(output / "model.safetensors")
    for path, factors in read_adapter(adapter).modules.items():
        name = f"{path}.weight"
        tensors[name] = (tensors[name].double() + factors.delta()).float()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(output)


def prove(folder: Path, logits: Tensor, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    done = converted(folder / "adapter", folder / "base", folder / "out", **settings)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert off_by(logits_of(base), logits) > 1000 * EXACT, "the adapter does nothing: this test could not fail"
    assert off_by(logits_of(added(folder / "base", folder / "out", folder / "added")), logits) < EXACT
    return done


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (config | changes).items() if value != "absent"}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter" / WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}, file)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_parameters": EXPERTS[::-1]},
        {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
        {"target_parameters": EXPERTS[:1]},
        {"target_parameters": EXPERTS[1:]},
        {"use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
        {
            "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "rank_pattern": {"mlp.experts.down_proj": 2, "mlp.experts.gate_up_proj": 3, "q_proj": 5, "gate": 7,
                             "experts.gate_up_proj": 4},
            "alpha_pattern": {"1.mlp.experts.gate_up_proj": 3, "mlp.gate.weight": 5, "mlp.gate": 50},
        },
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The following")
def test_experts_are_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    done = prove(tmp_path, trained(tmp_path, **settings))
    assert done.detection.family == "lora"
    assert done.error < 1e-6
    assert done.reading.served is None, "vLLM refuses fused experts over a base that has them one by one"


def test_mixtral_is_written_in_the_checkpoints_names(tmp_path: Path) -> None:
    logits = trained(tmp_path, build_mixtral, target_parameters=[*EXPERTS, "mlp.gate.weight"])
    done = prove(tmp_path, logits)
    names = {path.partition("layers.0.")[2] for path in done.modules if "layers.0." in path}
    experts = {f"block_sparse_moe.experts.{expert}.w{index}" for expert in range(4) for index in (1, 2, 3)}
    assert names == experts | {"block_sparse_moe.gate", "self_attn.q_proj", "self_attn.v_proj"}


def as_older_peft(model: Any, config: Any) -> Any:
    """Wrap the model as PEFT did before 0.19.1, which took every stack for one of transposed experts, (E, in, out)."""
    stacks = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    for stack in stacks:
        stack.is_transposed = True  # asked by PEFT while it wraps, and by the model while it computes
    model = get_peft_model(model, config)
    for stack in stacks:
        stack.is_transposed = False
    return model


def test_factors_of_older_peft(tmp_path: Path) -> None:
    logits = trained(tmp_path, wrap=as_older_peft)
    shapes = {name: tuple(one.shape) for name, one in load_file(tmp_path / "adapter" / WEIGHTS).items()}
    assert shapes["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"] == (4 * 4, 48)
    edit_config(tmp_path, peft_version="absent")
    prove(tmp_path, logits)


@pytest.mark.parametrize(
    ("size", "targets", "version"),
    [(16, EXPERTS, "absent"), (32, EXPERTS[1:], "0.18.1"), (32, EXPERTS[1:], "0.19.0")],
)
def test_square_experts_of_older_peft(tmp_path: Path, size: int, targets: list[str], version: str) -> None:
    """Where gate_up_proj is square, down_proj tells; where all are, the version does."""
    logits = trained(
        tmp_path, lambda: build_qwen(moe_intermediate_size=size), wrap=as_older_peft, target_parameters=targets
    )
    edit_config(tmp_path, peft_version=version)
    prove(tmp_path, logits)


def test_square_experts_of_unknown_peft_are_refused(tmp_path: Path) -> None:
    logits = trained(tmp_path, lambda: build_qwen(moe_intermediate_size=16), target_parameters=EXPERTS[:1])
    prove(tmp_path, logits)
    edit_config(tmp_path, peft_version="absent")
    with pytest.raises(InputError, match="GS-3124"):
        converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "other")


def silence(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the third expert one that saw no token in training."""
    for name in tensors:
        if "experts" in name and "lora_B" in name:
            tensors[name][:, 2::4] = 0
    return tensors


def ranks_by_projection(folder: Path) -> dict[str, list[int]]:
    """(layer and projection) -> ranks of its experts, as written."""
    found: dict[str, list[int]] = {}
    for path, rank in read_adapter(folder).ranks.items():
        layer, _, rest = path.partition(".experts.")
        if rest:
            found.setdefault(f"{layer} {rest.partition('.')[2]}", []).append(rank)
    return found


@pytest.mark.parametrize("settings", [{}, {"target_parameters": EXPERTS[:1]}, {"layers_to_transform": [1]}])
def test_layers_of_experts_are_written_whole(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained(tmp_path, **settings)
    edit_tensors(tmp_path, silence)
    done = converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    ranks = ranks_by_projection(tmp_path / "out")
    assert len(ranks) == 2 * 3
    assert all(len(ranks[name]) == 4 and len(set(ranks[name])) == 1 for name in ranks)
    silent = done.modules["model.layers.1.mlp.experts.2.gate_proj"]
    assert (silent.norm, silent.error, silent.rank, silent.full_rank) == (0, 0, 4, 0)


def test_levelling_leaves_other_modules_alone(tmp_path: Path) -> None:
    build_qwen().save_pretrained(tmp_path)
    layer = "model.layers.0.mlp.experts"
    ranks = {f"{layer}.1.up_proj": 3, f"{layer}.3.up_proj": 0, f"{layer}.3.down_proj": 2, "x.q_proj": 5, "x.k_proj": 0}
    experts = {
        f"{layer}.{expert}.{name}": rank
        for expert in range(4)
        for name, rank in (("gate_proj", 1), ("up_proj", 3), ("down_proj", 2))
    }
    assert level(ranks, BaseWeights(tmp_path)) == {**experts, "x.q_proj": 5, "x.k_proj": 0}
    assert level({f"{layer}.1.up_proj": 0}, BaseWeights(tmp_path)) == {f"{layer}.1.up_proj": 0}


def test_truncated_experts_have_one_rank(tmp_path: Path) -> None:
    trained(tmp_path)
    done = converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", tolerance=0.3)
    ranks = ranks_by_projection(tmp_path / "out")
    assert min(rank for each in ranks.values() for rank in each) < 4
    assert all(len(set(each)) == 1 for each in ranks.values())
    assert 0 < done.error <= 0.3


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    trained(tmp_path)
    done = converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    again = converted(tmp_path / "out", tmp_path / "base", tmp_path / "again", form="native")
    first, second = (read_adapter(one.folder).modules for one in (done, again))
    assert again.detection.family == "lora"
    assert list(first) == list(second)
    assert all(off_by(first[path].delta(), second[path].delta()) < 1e-6 for path in first)


def test_base_is_needed(tmp_path: Path) -> None:
    from converters.lora import read
    from converters.reading import Inputs
    from converters.source import open_source

    trained(tmp_path)
    with pytest.raises(UsageError, match="GS-230"):
        read(open_source(tmp_path / "adapter"), Inputs())


def drop(*marks: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: one for name, one in tensors.items() if not any(mark in name for mark in marks)}


def cut(rows: int, *marks: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {"experts.lora_A": lambda one: one[:rows], "experts.lora_B": lambda one: one[:, :rows]}
        for mark in marks or parts:
            tensors |= {name: parts[mark](one) for name, one in tensors.items() if mark in name}
        return tensors

    return edit


@pytest.mark.parametrize(
    ("code", "config", "edit"),
    [
        ("GS-3121", {}, cut(14)),
        ("GS-3121", {"rank_pattern": {"experts.down_proj": 3}}, None),
        ("GS-3121", {"rank_pattern": {"experts.down_proj": "4"}}, None),
        ("GS-3121", {}, cut(12, "experts.lora_A")),
        ("GS-3122", {}, cut(12)),
        ("GS-3122", {"r": 2, "rank_pattern": {"q_proj": 4, "v_proj": 4}}, None),
        ("GS-3123", {"target_parameters": EXPERTS[:1]}, None),
        ("GS-3123", {"target_parameters": None}, None),
        ("GS-3123", {}, drop("base_layer")),
        ("GS-3123", {}, drop("experts.lora_")),
        ("GS-3108", {}, drop("base_layer.lora_B")),
    ],
)  # fmt: skip
def test_contradictions_are_refused(
    tmp_path: Path, code: str, config: dict[str, Any], edit: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None
) -> None:
    trained(tmp_path)
    edit_config(tmp_path, **config)
    if edit:
        edit_tensors(tmp_path, edit)
    with pytest.raises(GoraError, match=code):
        converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("GS-3122", {"num_experts": 8}),
        ("GS-3122", {"num_experts": 2}),
        ("GS-405", {"moe_intermediate_size": 40}),
        ("GS-404", {"num_hidden_layers": 1}),
        ("GS-404", {"mlp_only_layers": [0, 1], "intermediate_size": 48}),
    ],
)
def test_other_bases_are_refused(tmp_path: Path, code: str, changes: dict[str, Any]) -> None:
    trained(tmp_path)
    build_qwen(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises((BindingError, InputError), match=code):
        converted(tmp_path / "adapter", tmp_path / "other", tmp_path / "out")


def test_fused_checkpoints_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, build_gpt_oss)
    with pytest.raises(InputError, match="GS-3120") as refused:
        converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert "gora-serve merge BASE" in str(refused.value)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (build_qwen, {}),
        (build_qwen, {"rank_pattern": {"mlp.experts.down_proj": 2}}),
        (build_qwen, {"target_parameters": EXPERTS[:1]}),
        (build_mixtral, {"r": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore:The following")
def test_peft_loads_the_padded_form(tmp_path: Path, build: Callable[[], Any], settings: dict[str, Any]) -> None:
    logits = trained(tmp_path, build, **settings)
    done = prove(tmp_path, logits, form="padded")
    assert any("--form padded" in note for note in done.reading.notes)
    assert off_by(logits_of(load_on(tmp_path / "base", tmp_path / "out")), logits) < EXACT


@pytest.mark.filterwarnings("ignore:The following")
def test_peft_loads_experts_that_saw_no_token(tmp_path: Path) -> None:
    trained(tmp_path)
    edit_tensors(tmp_path, silence)
    converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", form="padded")
    right = logits_of(added(tmp_path / "base", tmp_path / "out", tmp_path / "added"))
    assert off_by(logits_of(load_on(tmp_path / "base", tmp_path / "out")), right) < EXACT


def test_a_merge_that_levels_experts_above_its_budget_says_so(tmp_path: Path) -> None:
    trained(tmp_path)
    given = [(tmp_path / "adapter", 1.0)]
    located = Base(str(tmp_path / "base"), tmp_path / "base")
    exact = merge_adapters(given, located, tmp_path / "exact", MergeConfig(into="adapter"))
    assert not [line for line in exact.warnings if "parameters" in line]
    budget = exact.adapter.parameters // 3
    done = merge_adapters(given, located, tmp_path / "small", MergeConfig(into="adapter", parameters=budget))
    assert done.adapter.parameters > budget
    assert [
        line
        for line in done.warnings
        if line.startswith(f"{done.adapter.parameters:,} parameters, above the {budget:,}")
    ]
    assert done.receipt["notes"]


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_a_density_that_the_method_has_no_use_for_is_refused(method: Any) -> None:
    MergeConfig(into="adapter", method="ties", density=0.5).validate()
    with pytest.raises(UsageError, match="--density is for") as caught:
        MergeConfig(into="adapter", method=method, density=0.5).validate()
    assert caught.value.code == "GS-201"
