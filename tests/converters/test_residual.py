"""Adapters over a residual model, whose configuration says `true`: the initial part is in the files beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inits import LINEAR, Run, edit_config, make_run, prove_exact_as
from peft import LoraConfig, get_peft_model
from proving import converted, logits_of, train
from tiny_models import build_llama

from converters.reading import Inputs
from gora_serve.errors import UsageError


def official(run: Run, folder: Path) -> Run:
    """As GraphPKU/PiSSA leaves it: the residual model with pissa_init inside, which the configuration names."""
    shutil.copytree(run.initial, run.mutated / "pissa_init")
    for adapter in (run.adapter, run.mutated / "pissa_init"):
        edit_config(adapter, init_lora_weights=True, base_model_name_or_path=str(run.mutated))
    return run


def factory(run: Run, folder: Path) -> Run:
    """As LLaMA-Factory leaves it: the output folder holds pissa_init and pissa_backup."""
    shutil.copytree(run.initial, folder / "output" / "pissa_init")
    shutil.copytree(run.adapter, folder / "output" / "pissa_backup")
    edit_config(folder / "output" / "pissa_backup", init_lora_weights=True, base_model_name_or_path="gone")
    return Run(folder / "output" / "pissa_backup", run.initial, run.mutated, run.trained)


@pytest.mark.parametrize("layout", [official, factory])
def test_pissa_of_other_tools(tmp_path: Path, tiny_base: Path, layout: Callable[[Run, Path], Run]) -> None:
    run = layout(make_run(tmp_path, "pissa_niter_4"), tmp_path)
    done = prove_exact_as(run, tiny_base, tmp_path, "residual")
    assert "pissa_init" in done.reading.method
    assert (str(run.mutated) in done.reading.method) == (layout is official)


def test_the_residual_model_alone(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    edit_config(run.adapter, init_lora_weights=True, base_model_name_or_path=str(run.mutated))
    done = prove_exact_as(run, tiny_base, tmp_path, "residual")
    assert "W0 - W_res" in done.reading.method
    edit_config(run.adapter, base_model_name_or_path=str(tiny_base))  # the untouched base is no residual model
    with pytest.raises(UsageError, match="cannot be computed again") as refused:
        converted(run.adapter, tiny_base, tmp_path / "none", family="residual")
    assert refused.value.code == "GS-232"


def test_milora(tmp_path: Path, tiny_base: Path) -> None:
    """The smallest singular parts instead of the largest, saved as a residual model and an adapter."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)
    model = get_peft_model(build_llama(), config)
    residual = build_llama()
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            U, S, Vh = torch.linalg.svd(weight.data, full_matrices=False)
            root = (S[-4:] / 2).sqrt()
            module.lora_A["default"].weight.data = root[:, None] * Vh[-4:]
            module.lora_B["default"].weight.data = U[:, -4:] * root
            weight.data -= 2 * module.lora_B["default"].weight.data @ module.lora_A["default"].weight.data
            residual.get_submodule(name).weight.data = weight.data.clone()
    residual.save_pretrained(tmp_path / "residual")
    model.save_pretrained(tmp_path / "initial")
    train(model).save_pretrained(tmp_path / "adapter")
    run = Run(tmp_path / "adapter", tmp_path / "initial", tmp_path / "residual", logits_of(model))
    for name, inputs in {
        "mutated": Inputs(mutated_base=run.mutated), "init": Inputs(init_adapter=run.initial),
        "both": Inputs(init_adapter=run.initial, mutated_base=run.mutated),
    }.items():  # fmt: skip
        prove_exact_as(run, tiny_base, tmp_path / f"out-{name}", "residual", inputs)
