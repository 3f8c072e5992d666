"""Whether an update can be one of this base's at all: its shape, and numbers that double precision can work with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.deploy.base import BaseWeights, misfit
from gora_serve.errors import InputError

LARGEST = 1e100  # of |scale| |A| |B|: squares of it, and their sums, are still finite in double precision


def check_update(base: BaseWeights, path: str, factors: LoraFactors, *, file: Path | None = None) -> None:
    """Raise BindingError (GS-404, GS-405) for a module that the base lacks or has in another shape, and InputError
    (GS-3105) for NaN, infinite or absurdly large values. file: where the factors come from, for the message."""
    base.check_shape(path, factors.shape)
    check_size(path, factors, file=file)


def check_size(path: str, factors: LoraFactors, *, file: Path | None = None) -> None:
    """Raise InputError (GS-3105) for NaN, infinite or absurdly large values."""
    size = abs(factors.scale) * float(factors.A.double().norm()) * float(factors.B.double().norm())
    if not size < LARGEST:
        finite = math.isfinite(size) or bool(factors.A.isfinite().all() and factors.B.isfinite().all())
        words = "is too large for any arithmetic" if finite else "holds NaN or infinite values"
        raise diverged(f"the update {words}", file, path)


def check_carried(base: BaseWeights, carried: Mapping[str, Tensor], *, file: Path | None = None) -> None:
    """Refuse NaN (GS-3105), and a shape that is not the base's (GS-405). What the base lacks is a head of its own."""
    for parameter, tensor in carried.items():
        ours = base.counterpart(parameter)
        if ours is not None and base.tensors.shape(ours) != tuple(tensor.shape):
            raise misfit(file or base.folder, parameter, base.tensors.shape(ours), tuple(tensor.shape))
        if not tensor.isfinite().all():
            raise diverged("a module that is carried holds NaN or infinite values", file, parameter)


def diverged(what: str, file: Path | None, tensor: str) -> InputError:
    """Return the error (GS-3105) for numbers that no training means."""
    return InputError(
        what, code="GS-3105", file=file, tensor=tensor,
        hint="training diverged, or the file is damaged: use an earlier checkpoint",
    )  # fmt: skip
