"""GoRA of MyTransformers, rebuilt from its forward pass: x + scale * (x aᵀ) bᵀ, RoPE on neighbors in its own Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_llama import PlainLlama, random_factors
from proving import EXACT, converted, input_ids, load_on, logits_of, off_by, prove_exact
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_PATHS, build_llama, llama_shapes
from torch import Tensor

from converters.read import read
from converters.reading import Inputs
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import GoraError

RANKS = {path: (1, 3, 8)[index % 3] for index, path in enumerate(LLAMA_PATHS[:-1])}  # the last down_proj has rank 0
OWN_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
SCALER, MEAN_RANK = 16, 4


def own_name(path: str) -> str:
    layer, _, kind = path.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{OWN_NAMES[kind]}"


def write_run(
    folder: Path, factors: dict[str, tuple[Tensor, Tensor]], *, own: bool = False, prefix: str = "", **config: Any
) -> Path:
    """Write a run: the checkpoint, config.json and rank.json with floats and a zero."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path: prefix + (own_name(path) if own else path) for path in LLAMA_PATHS}
    tensors = {}
    for path, (down, up) in factors.items():
        tensors |= {f"{names[path]}.weight_a": down, f"{names[path]}.weight_b": up}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    ranks = {names[path]: float(factors[path][0].shape[0]) if path in factors else 0 for path in LLAMA_PATHS}
    (folder / "rank.json").write_text(json.dumps(ranks))
    settings = {"use_gora": True, "lora_scaler": SCALER, "lora_rank": MEAN_RANK, "gora_init_method": "compress"}
    (folder / "config.json").write_text(json.dumps(settings | {"gora_dynamic_scaling": False} | config))
    return folder


def their_logits(base: Path, factors: dict[str, tuple[Tensor, Tensor]], *, own: bool, **config: Any) -> Tensor:
    """The model's logits with the adapter as LinearWithGoRA runs it, in float64."""

    def update(path: str, x: Tensor) -> Tensor | float:
        if path not in factors:
            return 0.0
        a, b = (one.double() for one in factors[path])
        rank = a.shape[0] if config.get("gora_dynamic_scaling") else MEAN_RANK
        return SCALER / (rank**0.5 if config.get("gora_rank_stablize") else rank) * (x @ a.T @ b.T)

    return PlainLlama(base, neighbors=own).logits(input_ids(), update).float()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_every_scale_rule_under_both_names(
    tmp_path: Path, tiny_base: Path, dynamic: bool, stabilized: bool, own: bool
) -> None:
    config = {"gora_dynamic_scaling": dynamic, "gora_rank_stablize": stabilized}
    factors = random_factors(llama_shapes(), RANKS)
    run = write_run(tmp_path / "run", factors, own=own, **config)
    trained = their_logits(tiny_base, factors, own=own, **config)
    prove_exact(run, tiny_base, tmp_path / "out", trained, family="gora")
    for wrong in ({"gora_dynamic_scaling": not dynamic}, {"gora_rank_stablize": not stabilized}):
        assert off_by(their_logits(tiny_base, factors, own=own, **(config | wrong)), trained) > 1000 * EXACT


@pytest.mark.parametrize(("own", "prefix"), [(True, "model."), (False, ""), (False, "cut")])
def test_names_with_and_without_their_first_part(tmp_path: Path, tiny_base: Path, own: bool, prefix: str) -> None:
    factors = random_factors(llama_shapes(), RANKS)
    run = write_run(tmp_path / "run", factors, own=own, prefix="" if prefix == "cut" else prefix)
    if prefix == "cut":  # the Hugging Face names of an inner model
        file = run / "adapter_model.safetensors"
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    trained = their_logits(tiny_base, factors, own=own)
    done = prove_exact(run, tiny_base, tmp_path / "out", trained, family="gora")
    assert set(done.modules) == set(RANKS)


def test_the_checkpoint_as_it_is_saved(tmp_path: Path, tiny_base: Path) -> None:
    """final.ckpt is a pickle with the optimizer's state in it: opened where that is allowed, weights only."""
    factors = random_factors(llama_shapes(), RANKS)
    run = write_run(tmp_path / "run", factors, own=True)
    tensors = load_file(run / "adapter_model.safetensors")
    (run / "adapter_model.safetensors").unlink()
    states = {number: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)} for number in range(3)}
    optimizer = {"state": states, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1, 2]}]}
    content = {"optimizer_state_dict": optimizer, "lr_scheduler_state_dict": {"num_iters": 3}}
    torch.save({"model_state_dict": tensors, **content}, run / "final.ckpt")
    with pytest.raises(GoraError, match="GS-3110"):
        converted(run, tiny_base, tmp_path / "out")
    trained = their_logits(tiny_base, factors, own=True)
    done = prove_exact(run, tiny_base, tmp_path / "out", trained, inputs=Inputs(pickles=True))
    assert done.detection.family == "gora"


def test_rows_of_queries_and_keys_matter(tmp_path: Path, tiny_base: Path) -> None:
    """The same tensors under Hugging Face names are another update: the permutation is not a formality."""
    factors = random_factors(llama_shapes(), RANKS)
    trained = their_logits(tiny_base, factors, own=True)
    converted(write_run(tmp_path / "run", factors), tiny_base, tmp_path / "out", family="gora")
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), trained) > 1000 * EXACT


def test_a_whole_model_in_the_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    """Without --save-trainable the base's weights are saved too: copies add nothing, others are refused."""
    factors = random_factors(llama_shapes(), RANKS)
    run = write_run(tmp_path / "run", factors, own=True)
    plain = PlainLlama(tiny_base, neighbors=True)
    whole = {f"{own_name(path)}.weight": plain.weights[f"{path}.weight"].float() for path in LLAMA_PATHS}
    whole |= {
        "tok_embeddings.weight": plain.weights["model.embed_tokens.weight"].float(),
        "norm.weight": plain.weights["model.norm.weight"].float(),
        "layers.1.ffn_norm.weight": plain.weights["model.layers.1.post_attention_layernorm.weight"].float(),
    }
    file = run / "adapter_model.safetensors"
    save_file(load_file(file) | {name: tensor.contiguous() for name, tensor in whole.items()}, file)
    trained = their_logits(tiny_base, factors, own=True)
    prove_exact(run, tiny_base, tmp_path / "out", trained, family="gora")
    _, _, reading = read(run, Inputs(base=BaseWeights(tiny_base)), "gora")
    assert set(reading.known) == set(whole)

    whole["layers.0.attention.wq.weight"] = whole["layers.0.attention.wq.weight"] + 0.1
    save_file(load_file(file) | {name: tensor.contiguous() for name, tensor in whole.items()}, file)
    with pytest.raises(GoraError, match="GS-3104") as caught:
        converted(run, tiny_base, tmp_path / "other", family="gora")
    assert caught.value.fields["tensor"] == "layers.0.attention.wq.weight"


def test_an_initialization_that_edits_the_base(tmp_path: Path, tiny_base: Path) -> None:
    """weight_svd: the base became W - s b0 a0, so the update on W is s b a - s b0 a0."""
    initial = random_factors(llama_shapes(), RANKS)
    trained = {path: (down + 0.01, up * 1.05) for path, (down, up) in initial.items()}
    run = write_run(tmp_path / "run", trained, gora_init_method="weight_svd")
    with pytest.raises(GoraError, match="GS-232"):
        converted(run, tiny_base, tmp_path / "out", family="gora")
    start = write_run(tmp_path / "start", initial, gora_init_method="weight_svd")
    others = {path: (down.flip(1), up.flip(0)) for path, (down, up) in initial.items()}
    fewer = {path: factors for path, factors in initial.items() if path != LLAMA_PATHS[3]}
    for name, wrong, code in (("others", others, "GS-431"), ("fewer", fewer, "GS-430")):
        inputs = Inputs(init_adapter=write_run(tmp_path / name, wrong, gora_init_method="weight_svd"))
        with pytest.raises(GoraError, match=code):
            converted(run, tiny_base, tmp_path / "out", inputs=inputs, family="gora")

    scale = SCALER / MEAN_RANK

    def update(path: str, x: Tensor) -> Tensor | float:
        if path not in trained:
            return 0.0
        (a, b), (a0, b0) = (tuple(one.double() for one in some[path]) for some in (trained, initial))
        return scale * (x @ a.T @ b.T - x @ a0.T @ b0.T)

    logits = PlainLlama(tiny_base, neighbors=False).logits(input_ids(), update).float()
    prove_exact(run, tiny_base, tmp_path / "out", logits, inputs=Inputs(init_adapter=start), family="gora")

    edited = build_llama()
    for path, (down, up) in initial.items():
        edited.get_submodule(path).weight.data -= scale * up @ down
    edited.save_pretrained(tmp_path / "edited")
    inputs = Inputs(mutated_base=tmp_path / "edited")
    prove_exact(run, tiny_base, tmp_path / "out2", logits, inputs=inputs, family="gora")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda run: (run / "config.json").unlink(), "GS-3173"),
        (lambda run: (run / "config.json").write_text('{"use_lora": true, "lora_scaler": 16}'), "GS-3174"),
        (lambda run: edit(run / "config.json", lora_scaler=math.nan), "GS-319"),
        (lambda run: edit(run / "config.json", lora_rank=0), "GS-3174"),
        (lambda run: edit(run / "config.json", gora_init_method="new"), "GS-3174"),
        (lambda run: edit(run / "rank.json", **{LLAMA_PATHS[0]: 2.5}), "GS-3175"),
        (lambda run: edit(run / "rank.json", **{LLAMA_PATHS[-1]: 4}), "GS-3175"),
        (lambda run: (run / "rank.json").write_text("[]"), "GS-3176"),
        (lambda run: drop(run, f"{LLAMA_PATHS[0]}.weight_b"), "GS-3171"),
        (lambda run: add(run, f"{LLAMA_PATHS[0].removeprefix('model.')}.weight_a"), "GS-3170"),
    ],
)
def test_what_is_refused(tmp_path: Path, tiny_base: Path, change: Any, code: str) -> None:
    run = write_run(tmp_path / "run", random_factors(llama_shapes(), RANKS))
    change(run)
    with pytest.raises(GoraError) as caught:
        converted(run, tiny_base, tmp_path / "out", family="gora")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_heads_that_are_not_the_bases(tmp_path: Path, tiny_base: Path) -> None:
    shapes = llama_shapes() | {"model.layers.0.self_attn.q_proj": (30, 32)}
    run = write_run(tmp_path / "run", random_factors(shapes, RANKS), own=True)
    with pytest.raises(GoraError, match="GS-460"):
        converted(run, tiny_base, tmp_path / "out", family="gora")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(run: Path, name: str) -> None:
    file = run / "adapter_model.safetensors"
    save_file({one: tensor for one, tensor in load_file(file).items() if one != name}, file)


def add(run: Path, name: str) -> None:
    file = run / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.ones(1, 32)}, file)
