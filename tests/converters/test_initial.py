"""The sources of the initial update: their order, their agreement, and the wrong ones that are noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from inits import inputs_of, make_run, prove_exact_as
from proving import converted
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from converters.decompose import nearest
from converters.mutated import MutatedBase
from converters.reading import Inputs
from gora_serve.adapter.linalg import distance, norm
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError

PATH = "model.layers.0.mlp.up_proj"


def test_a_mutated_base_that_is_none(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    with pytest.raises(BindingError, match="nothing was taken out") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=tiny_base), family="pissa")
    assert refused.value.code == "GS-434"


def test_a_mutated_base_that_differs_elsewhere(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4", target_modules=["q_proj"])
    more = make_run(tmp_path / "more", "pissa_niter_4")
    with pytest.raises(BindingError, match="where the adapter has nothing") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=more.mutated), family="pissa")
    assert refused.value.code == "GS-435"


def test_a_mutated_base_that_was_trained(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    tensors = load_file(run.mutated / "model.safetensors")
    tensors[f"{PATH}.weight"] += 1e-3 * torch.randn_like(tensors[f"{PATH}.weight"])
    save_file(tensors, run.mutated / "model.safetensors", {"format": "pt"})
    with pytest.raises(BindingError, match="less a part of the adapter's rank") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=inputs_of(run, "mutated"), family="pissa")
    assert refused.value.code == "GS-436"
    assert PATH in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_mutated_base_of_another_shape(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    other = make_run(tmp_path / "other", "pissa_niter_4", build=lambda: build_llama(intermediate_size=48))
    with pytest.raises(BindingError, match="another shape") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=other.mutated), family="pissa")
    assert refused.value.code == "GS-439"


def test_initial_adapter_and_mutated_base_of_two_runs(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_1", r=2, prepare=lambda *_: torch.manual_seed(1))
    other = make_run(tmp_path / "other", "pissa_niter_1", r=2, prepare=lambda *_: torch.manual_seed(2))
    inputs = Inputs(init_adapter=run.initial, mutated_base=other.mutated)
    with pytest.raises(BindingError, match="not what the mutated base lacks") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=inputs, family="residual")
    assert refused.value.code == "GS-432"


def test_flags_come_before_what_lies_beside_the_adapter(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    plain = make_run(tmp_path / "plain", True)
    shutil.copytree(plain.initial, run.adapter / "pissa_init")  # useless, and would be refused
    done = prove_exact_as(run, tiny_base, tmp_path, "pissa", inputs_of(run, "init"))
    assert str(run.initial) in done.reading.method
    with pytest.raises(BindingError, match="adds nothing") as refused:
        converted(run.adapter, tiny_base, tmp_path / "other", family="pissa")
    assert refused.value.code == "GS-438"


def test_modules_that_were_not_edited_have_no_initial_part(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    pair = MutatedBase(BaseWeights(tiny_base), BaseWeights(run.mutated))
    assert norm(pair.initial(PATH, 4)) > 1
    assert norm(MutatedBase(pair.base, pair.base).initial(PATH, 4)) == 0


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_the_cliff(dtype: str, close: float) -> None:
    """W0 - W_res holds P0 of rank r: found to what rounding W_res to its dtype leaves."""
    generator = torch.Generator().manual_seed(0)
    P0 = torch.randn(96, 4, generator=generator) @ torch.randn(4, 64, generator=generator) / 8
    W0 = torch.randn(96, 64, generator=generator)
    D = W0.double() - (W0 - P0).to(getattr(torch, dtype)).double()
    found, one_more = nearest(D, 4), nearest(D, 5)
    assert float((found.delta() - P0).norm()) < close * float(P0.norm())
    assert distance(one_more, found) < close * float(P0.norm())  # nothing but rounding beyond rank 4
