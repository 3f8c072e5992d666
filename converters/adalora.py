"""AdaLoRA of PEFT (Zhang et al. 2023): B (E * A) with singular values E, pruned to another rank in each module.

PEFT divides by the rank that training began with, whatever is left of it: the scale is alpha / (init_r + 1e-5).
"""

from __future__ import annotations

from converters.checks import check_pair, check_shape
from converters.parts import parts_of, reading_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.peft_config import LARGEST
from gora_serve.errors import InputError

PARTS = ("lora_A", "lora_B", "lora_E")  # (r, in), (out, r), (r, 1)
EPSILON = 1e-5  # PEFT's, tuners/adalora/layer.py


def read(source: Source, inputs: Inputs) -> Reading:
    """Read AdaLoRA. A module that was pruned to rank 0 has no update. Raises InputError GS-3113 for no init_r."""
    parts = parts_of(source, PARTS, [PARTS])
    scale = _scale(source)
    for names in parts.values():
        _check_shapes(source, *(names[part] for part in PARTS))
    kept = [path for path, names in parts.items() if source.tensors.shape(names["lora_A"])[0]]

    def factors(path: str) -> LoraFactors:
        A, B, E = (source.tensors[parts[path][part]] for part in PARTS)
        return LoraFactors(E.double() * A.double(), B, scale)

    method = "alpha / init_r * B (E * A)"
    return reading_of(source, inputs, LazyModules(kept, factors), parts, method=method)


def _check_shapes(source: Source, A: str, B: str, E: str) -> None:
    if source.tensors.shape(A)[:1] == (0,):  # pruned away
        return
    check_pair(source, A, B)
    check_shape(source, E, (source.tensors.shape(A)[0], 1))


def _scale(source: Source) -> float:
    rank, alpha = source.config.get("init_r"), source.config.get("lora_alpha")
    if not (_is_number(rank) and isinstance(rank, int) and rank >= 1 and _is_number(alpha)):
        raise InputError(
            "AdaLoRA's scale is not known", code="GS-3113", file=source.config_file, expected="init_r and lora_alpha",
            actual=f"{str(rank)[:40]} and {str(alpha)[:40]}", hint="take adapter_config.json from the run's folder",
        )  # fmt: skip
    return (alpha if alpha > 0 else float(rank)) / (rank + EPSILON)  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
