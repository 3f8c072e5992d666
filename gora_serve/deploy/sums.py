"""What merging makes of one stored tensor, some of its rows at a time. Pure: tensors in, tensors out.

A tensor is seen as a matrix (rows, columns): its last dimension, and all the others together; a vector as (n, 1). Of a
Conv1D and of transposed experts the stored form counts, and the terms are turned before they come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors


class Term(Protocol):
    """One adapter's share in a tensor, its weight included."""

    def add(self, start: int, stop: int, W: Tensor, total: Tensor) -> None:
        """Add to `total` what belongs to rows [start, stop), of which W (rows, columns) are the base's."""

    def alone(self, start: int, stop: int, W: Tensor) -> Tensor | None:
        """Return these rows where nothing else is added and no difference to W has to be taken; None: it has to be."""

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        """Return the sum of the absolute values that are added up to the update: what rounding of inputs goes by."""


@dataclass(frozen=True)
class LowRank:
    """B A, (rows, columns): scale and weight are in B."""

    A: Tensor  # (r, columns)
    B: Tensor  # (rows, r)

    def add(self, start: int, stop: int, W: Tensor, total: Tensor) -> None:
        total.addmm_(self.B[start:stop], self.A)

    def alone(self, start: int, stop: int, W: Tensor) -> Tensor | None:
        return torch.addmm(W, self.B[start:stop], self.A)

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        return self.B[start:stop].abs() @ self.A.abs()


@dataclass(frozen=True)
class Stacked:
    """B_e A_e for the rows of each expert e of a fused tensor: A (E, r, columns), B (E, rows of one, r)."""

    A: Tensor
    B: Tensor

    def add(self, start: int, stop: int, W: Tensor, total: Tensor) -> None:
        height = self.B.shape[1]
        for expert in range(start // height, (stop - 1) // height + 1):
            low, high = max(start, expert * height), min(stop, (expert + 1) * height)
            part = self.B[expert, low - expert * height : high - expert * height]
            total[low - start : high - start].addmm_(part, self.A[expert])

    def alone(self, start: int, stop: int, W: Tensor) -> Tensor | None:
        return None

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        total = torch.zeros_like(W)
        Stacked(self.A.abs(), self.B.abs()).add(start, stop, W, total)
        return total


@dataclass(frozen=True)
class Dense:
    """An update of full rank, (rows, columns), as it is.

    sizes: what `spread` goes by, (rows, columns), where the base's weight was multiplied too; None: the update's own.
    lengths: how many of its rows or columns were brought to a length (DoRA).
    """

    delta: Tensor
    weight: float
    sizes: Tensor | None = None
    lengths: int = 0

    def add(self, start: int, stop: int, W: Tensor, total: Tensor) -> None:
        total.add_(self.delta[start:stop].to(W.dtype), alpha=self.weight)

    def alone(self, start: int, stop: int, W: Tensor) -> Tensor | None:
        return None

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        sizes = self.delta if self.sizes is None else self.sizes
        return sizes[start:stop].abs().to(W.dtype) * abs(self.weight)


@dataclass(frozen=True)
class Replaced:
    """Another tensor in the base's place, (rows, columns): weight * (tensor - W)."""

    tensor: Tensor
    weight: float

    def add(self, start: int, stop: int, W: Tensor, total: Tensor) -> None:
        total.add_(self.tensor[start:stop].to(W.dtype) - W, alpha=self.weight)

    def alone(self, start: int, stop: int, W: Tensor) -> Tensor | None:
        return self.tensor[start:stop].to(W.dtype) if self.weight == 1 else None

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        return self.tensor[start:stop].to(W.dtype).abs() + W.abs()


@dataclass(frozen=True)
class Rescaled:
    """DoRA (Liu et al. 2024, eq. 5): W' = m (W + B A) / |W + B A|, row by row; weight * (W' - W).

    A (r, columns) and B (rows, r) hold the scale, and no weight. m: (rows,).
    """

    A: Tensor
    B: Tensor
    m: Tensor
    weight: float

    @property
    def lengths(self) -> int:
        return self.m.shape[0]

    def _value(self, start: int, stop: int, W: Tensor) -> Tensor:
        moved = torch.addmm(W, self.B[start:stop], self.A).double()
        value: Tensor = (moved * (self.m[start:stop].double() / moved.norm(dim=1))[:, None]).to(W.dtype)
        return value

    def add(self, start: int, stop: int, W: Tensor, total: Tensor) -> None:
        total.add_(self._value(start, stop, W) - W, alpha=self.weight)

    def alone(self, start: int, stop: int, W: Tensor) -> Tensor | None:
        return self._value(start, stop, W) if self.weight == 1 else None

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        sizes = torch.addmm(W.abs(), self.B[start:stop].abs(), self.A.abs()).double()
        moved = torch.addmm(W, self.B[start:stop], self.A).double()
        spread: Tensor = (sizes * (self.m[start:stop].double() / moved.norm(dim=1))[:, None]).abs().to(W.dtype)
        return spread


@dataclass(frozen=True)
class Sum:
    """One tensor of the merged model, before it is rounded: the base's rows and all terms.

    dtype: what sums are taken in. ground: stands for the base's tensor where updates are added to another one (a
    vocabulary that was resized, a base in 4 bits). both: of a base in 4 bits, the sums on the weights as stored and on
    those that the model had in training, to be compared. shape: (rows, columns) of the result. sizes: more absolute
    values that `spread` counts.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    dtype: torch.dtype
    ground: Tensor | None = None
    both: tuple[Sum, Sum] | None = None
    sizes: Callable[[], Tensor] | None = None

    def base(self, start: int, stop: int, stored: Tensor | None) -> Tensor:
        """Return the rows that updates are added to; stored: those of the base's file, None where it has none."""
        if self.ground is not None:
            return self.ground[start:stop].to(self.dtype)
        return torch.zeros(stop - start, self.shape[1], dtype=self.dtype) if stored is None else stored.to(self.dtype)

    def rows(self, start: int, stop: int, W: Tensor) -> Tensor:
        """Return rows [start, stop) of the sum, never W itself; W is what `base` returned."""
        alone = self.terms[0].alone(start, stop, W) if len(self.terms) == 1 else None
        if alone is not None:
            return alone
        total = W.clone()
        for term in self.terms:
            term.add(start, stop, W, total)
        return total

    @property
    def lengths(self) -> int:
        """How many rows, or columns, are brought to a length (DoRA), whose rounding moves them as a whole; 0: none."""
        return max((term.lengths for term in self.terms if isinstance(term, (Dense, Rescaled))), default=0)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is computed: a tensor as it is stored, the base's or one in its place."""
        if not self.terms:
            return self.ground is None
        return len(self.terms) == 1 and isinstance(self.terms[0], Replaced) and self.terms[0].weight == 1

    def spread(self, start: int, stop: int, W: Tensor) -> Tensor:
        """Return what `Term.spread` does, of all terms together."""
        total = torch.zeros_like(W)
        for term in self.terms:
            total += term.spread(start, stop, W)
        return total if self.sizes is None else total + self.sizes()[start:stop].to(W.dtype)


def low_rank(pieces: Sequence[tuple[float, LoraFactors]], dtype: torch.dtype, *, turned: bool) -> LowRank:
    """Return Σ weight * scale * B A as one term, of stacked factors; turned: of the transpose."""
    pairs = [(one.A, one.B.double() * (one.scale * weight)) for weight, one in pieces]
    if turned:
        pairs = [(B.T, A.T) for A, B in pairs]
    A = torch.cat([A.to(dtype) for A, _ in pairs])
    B = torch.cat([B.to(dtype) for _, B in pairs], dim=1)
    return LowRank(A.contiguous(), B.contiguous())


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor of this shape."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]
