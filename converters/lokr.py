"""LoKr: the Kronecker product of two matrices, either of which may itself be low-rank (LyCORIS), as PEFT saves it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converters.checks import check_fits, check_pair, check_shape
from converters.loha import lycoris_scales
from converters.parts import Parts, parts_of, reading_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.peft_config import foreign_pattern, pattern_value
from gora_serve.errors import InputError

FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
SECOND = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
WHOLE = [one + two for one in FIRST for two in SECOND]
CONVOLUTION = "lokr_t2"


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoKr: delta = alpha / r * w1 ⊗ w2, exactly of rank(w1) * rank(w2).

    (U V) ⊗ (X Y) = (U ⊗ X) (V ⊗ Y). alpha / r is PEFT's scale even where both matrices are whole and r is in no shape;
    LyCORIS's own rule differs. Convolutions with a core (t2) are refused (GS-3150).
    """
    parts = parts_of(source, {CONVOLUTION, *(name for whole in WHOLE for name in whole)}, WHOLE)
    for path, one in parts.items():
        first, second = (_shape(source, one, name) for name in ("lokr_w1", "lokr_w2"))
        check_fits(inputs, path, (first[0] * second[0], first[1] * second[1]))
    scales = lycoris_scales(source, {path: _rank(source, path, one) for path, one in parts.items()})

    def factors(path: str) -> LoraFactors:
        U, V = _pair(source, parts[path], "lokr_w1")  # (l, k), (k, m)
        X, Y = _pair(source, parts[path], "lokr_w2")  # (o, j), (j, i)
        return LoraFactors(torch.kron(V, Y), torch.kron(U, X), scales[path])

    method = "Kronecker products of the factors, rank(w1) * rank(w2)"
    notes = ("the exact rank is the product of two ranks: --rank or --tolerance makes it smaller",)
    return reading_of(source, inputs, LazyModules(parts, factors), parts, method=method, notes=notes)


def _rank(source: Source, path: str, parts: Parts) -> int:
    """Return r: from a low-rank factor, else from the configuration."""
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if name in parts:
            return source.tensors.shape(parts[name])[0]
    pattern: Mapping[str, int] = foreign_pattern(source.config, "rank_pattern", file=source.config_file)
    rank: object = pattern_value(pattern, path, source.config.get("r", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise InputError(
            "the rank that divides alpha is not known", code="GS-3143", file=source.config_file, tensor=path,
            expected="r of at least 1", actual=str(rank)[:40],
            hint="correct r or rank_pattern in adapter_config.json, with alpha as it was in training",
        )  # fmt: skip
    return rank


def _shape(source: Source, parts: Parts, name: str) -> tuple[int, int]:
    """Return the shape of w1 or w2, whole or as the product of two. Raises InputError for what is no matrix."""
    if name in parts:
        check_shape(source, parts[name], (None, None))
        rows, columns = source.tensors.shape(parts[name])
        return rows, columns
    check_pair(source, parts[f"{name}_b"], parts[f"{name}_a"])
    return source.tensors.shape(parts[f"{name}_a"])[0], source.tensors.shape(parts[f"{name}_b"])[1]


def _pair(source: Source, parts: Parts, name: str) -> tuple[Tensor, Tensor]:
    """Return two factors of a matrix in float64; of a whole one, or where that is less, itself and an identity."""
    if name in parts:
        whole = source.tensors[parts[name]].double()
    else:
        a, b = source.tensors[parts[f"{name}_a"]].double(), source.tensors[parts[f"{name}_b"]].double()
        if b.shape[0] <= min(a.shape[0], b.shape[1]):
            return a, b
        whole = a @ b
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0], dtype=whole.dtype), whole
    return whole, torch.eye(whole.shape[1], dtype=whole.dtype)
