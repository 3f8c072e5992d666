"""PiSSA: computed again where it is unique, from files where it is randomized; what bfloat16 keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inits import PATTERNS, WAYS, edit_config, inputs_of, make_run, prove_exact_as
from proving import converted, load_on, logits_of, off_by
from safetensors.torch import save_file
from tiny_models import build_gpt2, build_llama

from converters.mutated import MutatedBase
from converters.reading import Inputs
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.format import read_adapter
from gora_serve.adapter.linalg import distance, norm, subtract
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError, UsageError


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{}, PATTERNS])
def test_exact_pissa(tmp_path: Path, tiny_base: Path, settings: dict[str, Any], way: str) -> None:
    run = make_run(tmp_path, "pissa", **settings)
    done = prove_exact_as(run, tiny_base, tmp_path, "pissa", inputs_of(run, way))
    if way == "computed":
        assert "smallest gap" in done.reading.notes[0]
    wrong = tmp_path / "wrong"
    converted(run.adapter, tiny_base, wrong, family="lora")
    assert off_by(logits_of(load_on(tiny_base, wrong)), run.trained) > 0.1  # served as it is


@pytest.mark.parametrize("way", WAYS)
def test_conv1d(tmp_path: Path, tiny_gpt2: Path, way: str) -> None:
    run = make_run(tmp_path, "pissa", build=build_gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    prove_exact_as(run, tiny_gpt2, tmp_path, "pissa", inputs_of(run, way))


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_randomized_svd_needs_its_files(tmp_path: Path, tiny_base: Path, way: str) -> None:
    run = make_run(tmp_path, "pissa_niter_2")
    with pytest.raises(UsageError, match="cannot be computed again") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", family="pissa")
    assert refused.value.code == "GS-232"
    assert "--init-adapter" in str(refused.value)
    assert "--mutated-base" in str(refused.value)
    assert not (tmp_path / "out").exists()
    prove_exact_as(run, tiny_base, tmp_path, "pissa", inputs_of(run, way))


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(tmp_path: Path, way: str) -> None:
    """The update's error is below what rounding the edited base to bfloat16 took, module by module."""
    base = tmp_path / "base"
    build_llama().to(torch.bfloat16).save_pretrained(base)
    run = make_run(tmp_path, "pissa", dtype=torch.bfloat16)
    done = converted(run.adapter, base, tmp_path / "out", inputs=inputs_of(run, way), family="pissa")
    pair = MutatedBase(BaseWeights(base), BaseWeights(run.mutated))
    written, trained = read_adapter(done.folder).modules, done.reading.served
    assert trained is not None
    for path, factors in trained.items():
        # what the trained model computes, less W0
        truth = pair.mutated.weight(path).double() + factors.delta() - pair.base.weight(path).double()
        rounding = pair.tolerance(path)
        assert 0 < float((truth - written[path].delta()).norm()) < rounding
        assert norm(factors) > 10 * rounding


def test_no_gap_no_unique_initial_part(tmp_path: Path) -> None:
    base, model = tmp_path / "base", build_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = torch.linalg.qr(torch.randn(32, 32))[0]  # all singular values are 1
    model.save_pretrained(base)
    run = make_run(tmp_path, "pissa", target_modules=["q_proj"])
    with pytest.raises(InputError, match="no gap") as refused:
        converted(run.adapter, base, tmp_path / "out", family="pissa")
    assert refused.value.code == "GS-3130"


def test_an_initial_adapter_of_another_base(tmp_path: Path, tiny_base: Path) -> None:
    """The trained adapter and the initial one belong together, and to a base with other weights."""
    run = make_run(tmp_path, "pissa_niter_4", build=lambda: build_llama(seed=1))
    with pytest.raises(BindingError, match="no part of this base") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=inputs_of(run, "init"), family="pissa")
    assert refused.value.code == "GS-433"


def test_the_trained_adapter_is_no_initial_one(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa")
    with pytest.raises(BindingError, match="no part of this base"):
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(init_adapter=run.adapter), family="pissa")
    with pytest.raises(InputError, match="update is zero"):
        converted(run.initial, tiny_base, tmp_path / "out", inputs=Inputs(init_adapter=run.initial), family="pissa")


@pytest.mark.parametrize("moved", [0.1, 0.01, 0.003])
def test_what_bfloat16_keeps_of_a_small_update(tmp_path: Path, moved: float) -> None:
    """1024 x 1024, r = 16, |dW| / |P0| = 0.1 to 0.003: under 0.5 % is lost; plain concatenation loses far more."""
    generator = torch.Generator().manual_seed(0)
    path, (base, adapter, initial) = "layers.0.proj", [tmp_path / name for name in ("base", "adapter", "initial")]
    W0 = torch.randn(1024, 1024, generator=generator) / 32
    U, S, Vh = torch.linalg.svd(W0)
    U, S, Vh = U[:, :16], S[:16].sqrt(), Vh[:16]
    P0 = LoraFactors(S[:, None] * Vh, U * S, 1.0)
    A, B = (torch.randn(P.shape, generator=generator) * P.std() for P in (P0.A, P0.B))
    step = moved
    for _ in range(20):  # the step that moves the update by `moved`
        trained = LoraFactors(P0.A + step * A, P0.B + step * B, 1.0)
        step *= moved * norm(P0) / distance(trained, P0)
    for folder, factors in ((adapter, trained), (initial, P0)):
        folder.mkdir()
        keys = {f"base_model.model.{path}.lora_{part}.weight": getattr(factors, part) for part in "AB"}
        save_file({key: value.contiguous() for key, value in keys.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
        edit_config(folder, peft_type="LORA", r=16, lora_alpha=16, init_lora_weights="pissa_niter_4")
    base.mkdir()
    save_file({f"{path}.weight": W0}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')

    done = converted(
        adapter, base, tmp_path / "out", inputs=Inputs(init_adapter=initial), family="residual", dtype="bfloat16"
    )
    exact = subtract(trained, P0)
    ours = distance(read_adapter(done.folder).modules[path], exact) / norm(exact)
    plain = LoraFactors(exact.A.bfloat16(), exact.B.bfloat16(), 1.0)
    concatenated = distance(plain, exact) / norm(exact)
    assert norm(exact) == pytest.approx(moved * norm(P0), rel=1e-3)
    assert ours < 0.005
    assert concatenated > 5 * ours * (0.1 / moved) ** 0.5
    assert done.error == pytest.approx(ours, rel=0.01)
