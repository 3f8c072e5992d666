"""CorDA: from PEFT's cache, the initial adapter or the edited base; refused without any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inits import WAYS, Run, inputs_of, make_run, prove_exact_as
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from proving import converted, input_ids
from safetensors.torch import save_file

from converters.reading import Inputs
from gora_serve.errors import BindingError, InputError, UsageError


def make_corda(folder: Path, method: str = "ipm", **settings: Any) -> tuple[Run, Path]:
    cache = folder / "cache" / "corda.pt"

    def prepare(model: Any, config: LoraConfig) -> None:
        def run_model() -> None:
            for row in input_ids().split(1):
                model(row)

        preprocess_corda(model, config, run_model=run_model)

    options = CordaConfig(cache_file=str(cache), corda_method=method)
    return make_run(folder, "corda", prepare=prepare, corda_config=options, **settings), cache


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(tmp_path: Path, tiny_base: Path, method: str) -> None:
    run, cache = make_corda(tmp_path, method)
    with pytest.raises(UsageError, match="cannot be computed again"):
        converted(run.adapter, tiny_base, tmp_path / "out", family="corda")
    for way in WAYS[1:]:
        prove_exact_as(run, tiny_base, tmp_path / f"out-{way}", "corda", inputs_of(run, way))
    done = prove_exact_as(run, tiny_base, tmp_path, "corda", Inputs(cache=cache, pickles=True))
    assert "cache" in done.reading.method
    tensors = {name: tensor.contiguous() for name, tensor in torch.load(cache).items()}
    save_file(tensors, tmp_path / "cache.safetensors")
    prove_exact_as(run, tiny_base, tmp_path / "safe", "corda", Inputs(cache=tmp_path / "cache.safetensors"))


def test_caches_that_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    run, cache = make_corda(tmp_path)
    with pytest.raises(InputError, match="pickle") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(cache=cache), family="corda")
    assert refused.value.code == "GS-3131"
    _, other = make_corda(tmp_path / "other", r=2)
    with pytest.raises(BindingError, match="not of this adapter") as unbound:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(cache=other, pickles=True), family="corda")
    assert unbound.value.code == "GS-437"
    (tmp_path / "bad.pt").write_bytes(b"no tensors")
    bad = Inputs(cache=tmp_path / "bad.pt", pickles=True)
    with pytest.raises(InputError, match="GS-3114"):
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=bad, family="corda")
    with pytest.raises(UsageError, match="cache is CorDA's"):
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(cache=cache), family="residual")
