"""What rounding did to one tensor, added up block by block: elements, changes, errors. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Tally:
    """Sums over the elements that were seen so far.

    elements: how many. changed: those whose bits are others than the base's, in the same type. max_error and
    squared_error: of the stored value less the sum before rounding. squared_update: of the sum less the base's. along:
    error times update, less what rounding the base alone to the same type does, from which follows how much of the
    update is stored. squared_stored and squared_quantized: of what adding to the weights as stored, and to those in 4
    bits, is away from the model in training; None elsewhere.
    """

    elements: int = 0
    changed: int = 0
    max_error: float = 0.0
    squared_error: float = 0.0
    squared_update: float = 0.0
    along: float = 0.0
    squared_stored: float | None = None
    squared_quantized: float | None = None

    def see(
        self, before: Tensor, exact: Tensor, stored: Tensor, base: Tensor | None = None, *, kept: Tensor | None = None
    ) -> None:
        """Take in a block: what the update is added to and the sum, both in the type of sums, and what is stored of it.

        base: the base's values as they were stored, where that is the type of the sum too. kept: the base's values in
        that type, where the update is added to others (NF4's), and which changes are counted against. `exact` is used
        up.
        """
        rounded = stored.to(exact.dtype)
        self.elements += stored.numel()
        alone = before.to(stored.dtype) if base is None else base
        self.changed += count_differing(stored, alone if kept is None else kept)
        error = rounded.sub_(exact).view(-1)
        update = exact.sub_(before).view(-1)
        self.max_error = max(self.max_error, *(abs(float(one)) for one in error.aminmax()))
        self.squared_error += float(error.dot(error))
        self.squared_update += float(update.dot(update))
        self.along += float(error.dot(update))
        if base is None:
            self.along -= float(alone.to(exact.dtype).sub_(before).view(-1).dot(update))

    def add(self, other: Tally) -> None:
        """Take in another tally of the same tensor."""
        self.elements += other.elements
        self.changed += other.changed
        self.max_error = max(self.max_error, other.max_error)
        self.squared_error += other.squared_error
        self.squared_update += other.squared_update
        self.along += other.along
        self.squared_stored = _plus(self.squared_stored, other.squared_stored)
        self.squared_quantized = _plus(self.squared_quantized, other.squared_quantized)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.squared_error)

    @property
    def rms_error(self) -> float:
        return math.sqrt(self.squared_error / self.elements) if self.elements else 0.0

    @property
    def update(self) -> float:
        """The Frobenius norm of the update."""
        return math.sqrt(self.squared_update)

    @property
    def held(self) -> float:
        """How much of the update is stored: <stored - base, update> / |update|^2, 1 for all of it; base: in the type of
        what is stored, so that its own rounding does not count."""
        return 1 + self.along / self.squared_update if self.squared_update else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return what the receipt says of a tensor."""
        value: dict[str, Any] = {
            "elements": self.elements, "changed": self.changed, "update": self.update, "held": self.held,
            "max_error": self.max_error, "rms_error": self.rms_error,
        }  # fmt: skip
        if self.squared_stored is not None and self.squared_quantized is not None:
            value["error_on_stored"] = math.sqrt(self.squared_stored)
            value["error_on_quantized"] = math.sqrt(self.squared_quantized)
        return value


def count_differing(one: Tensor, other: Tensor) -> int:
    """Return how many elements of two vectors of one type differ in their bits.

    NumPy compares integers of 16 bits ten times, and counts what is true three times, as fast as torch does.
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return int(np.count_nonzero(one.view(bits).numpy() != other.view(bits).numpy()))


def _plus(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other
