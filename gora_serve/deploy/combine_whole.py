"""What becomes of tensors that adapters carry whole (modules_to_save) when the adapters are merged into one.

They stand in the base's place, so that they cannot be added up without it: what is the same stays, what is averaged
with weights that sum to 1 needs no base (Σ w_i (W_i - W_0) + W_0 = Σ w_i W_i), and anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gora_serve.adapter.factors import Adapter, raw_bytes
from gora_serve.config import MergeMethod
from gora_serve.errors import InputError

AVERAGING = ("cat", "linear", "svd")  # of ties and dare the mean is none
_INTO_MODEL = "--into model is exact for any weights, and any tensors"


def combine_carried(given: Sequence[tuple[Adapter, float]], method: MergeMethod) -> dict[str, Tensor]:
    """Return parameter path -> tensor of the merged adapter, sorted. given: the adapters with their applied weights.

    Kept as it is: a tensor that several carry and that is the same in all of them, and one that a single adapter
    carries with weight 1. Averaged, in float64 and rounded once to its dtype: one that every adapter carries, with
    weights that sum to 1. Raises InputError (GS-3451) for all others, and for one that another adapter updates by LoRA.
    """
    names = sorted({name for adapter, _ in given for name in adapter.carried})
    return {name: _combined(name, given, method) for name in names}


def _combined(name: str, given: Sequence[tuple[Adapter, float]], method: MergeMethod) -> Tensor:
    found = [(adapter.carried[name], weight) for adapter, weight in given if name in adapter.carried]
    module = name.rpartition(".")[0]
    if any(module in adapter.modules for adapter, _ in given):
        raise _conflict(name, "carried by one adapter, and updated by another")
    first, weight = found[0]
    if len(found) == 1 and weight == 1:
        return first
    if len(found) > 1 and all(_same(tensor, first) for tensor, _ in found):
        return first
    if len(found) < len(given):
        raise _conflict(name, f"carried by {len(found)} of {len(given)} adapters, with weight {weight:g}")
    if not all(tensor.shape == first.shape and tensor.is_floating_point() for tensor, _ in found):
        raise _conflict(name, "of different shapes, or no floating-point numbers")
    total = math.fsum(weight for _, weight in found)
    if method not in AVERAGING or not math.isclose(total, 1, rel_tol=1e-9):
        way = f"--method linear averages it; {_INTO_MODEL}" if method != "linear" else _INTO_MODEL
        raise _conflict(name, f"different, with weights that sum to {total:g}, by {method}", hint=way)
    ordered = sorted(found, key=lambda pair: (pair[1], raw_bytes(pair[0])))
    mean = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, weight in ordered:
        mean += tensor.double() * weight
    return mean.to(_widest([tensor.dtype for tensor, _ in found]))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _conflict(name: str, actual: str, *, hint: str = _INTO_MODEL) -> InputError:
    return InputError(
        "a tensor that is carried whole cannot be merged", code="GS-3451", tensor=name,
        expected="the same in all adapters, or carried by all of them with weights that sum to 1", actual=actual,
        hint=hint,
    )  # fmt: skip
