"""KaSA: s B diag(d) A less the smallest singular parts of W0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inits import PATTERNS, inputs_of, make_run, prove_exact_as
from peft.tuners.lora.config import KasaConfig
from proving import EXACT, converted
from safetensors.torch import load_file, save_file

from converters.reading import Inputs
from gora_serve.errors import InputError, UsageError

SVD = 5 * EXACT  # PEFT puts the whole base together again from a float32 SVD, whose rounding has full rank


@pytest.mark.parametrize("settings", [{}, PATTERNS])
def test_kasa(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    run = make_run(tmp_path, True, kasa_config=KasaConfig(), **settings)
    done = prove_exact_as(run, tiny_base, tmp_path, "kasa", exact=SVD)
    assert {module.rank for module in done.modules.values()} <= {4, 8, 12}
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
