"""KaSA: s B diag(d) A less the smallest singular parts of W0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inits import PATTERNS, Run, inputs_of, make_run, prove_exact_as
from peft.tuners.lora.config import KasaConfig
from proving import EXACT, converted, load_on, logits_of, off_by
from safetensors.torch import load_file, save_file
from tiny_models import build_llama
from torch import Tensor

from converters.reading import Inputs
from gora_serve.adapter.peft_config import foreign_scales
from gora_serve.errors import InputError, UsageError
from gora_serve.integrity.canonical import read_json

SVD = 5 * EXACT  # PEFT puts the whole base together again from a float32 SVD, whose rounding has full rank


def exact_logits(run: Run) -> Tensor:
    """KaSA by its own formula in float64: W0 less its r smallest singular values, plus s B diag(d) A, rounded once."""
    model = build_llama()
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_diag") for name in tensors if name.endswith(".lora_diag")}
    ranks = {name.removeprefix("base_model.model."): tensors[f"{name}.lora_A.weight"].shape[0] for name in names}
    file = run.adapter / "adapter_config.json"
    scales = foreign_scales(dict(read_json(file)), ranks, file=file)  # type: ignore[arg-type]
    for path, rank in ranks.items():
        A, B, d = (
            tensors[f"base_model.model.{path}.lora_{part}"].double() for part in ("A.weight", "B.weight", "diag")
        )
        weight = model.get_submodule(path).weight
        U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        W = (U[:, :-rank] * S[:-rank]) @ Vh[:-rank] + scales[path] * (B * d) @ A
        weight.data.copy_(W)
    return logits_of(model)


@pytest.mark.parametrize("settings", [{}, PATTERNS])
def test_kasa(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    run = make_run(tmp_path, True, kasa_config=KasaConfig(), **settings)
    done = prove_exact_as(run, tiny_base, tmp_path, "kasa", exact=SVD)
    assert {module.rank for module in done.modules.values()} <= {4, 8, 12}
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), exact_logits(run)) < EXACT
    prove_exact_as(run, tiny_base, tmp_path / "other", "kasa", inputs_of(run, "mutated"), SVD)
    with pytest.raises(UsageError, match="in no adapter") as refused:
        converted(run.adapter, tiny_base, tmp_path / "x", inputs=Inputs(init_adapter=run.initial), family="kasa")
    assert refused.value.code == "GS-233"


def test_a_missing_diagonal(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, True, kasa_config=KasaConfig())
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("lora_diag")))
    save_file(tensors, file)
    with pytest.raises(InputError, match="no diagonal") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", family="kasa")
    assert refused.value.code == "GS-3133"
