"""The rows of a pool as plain matrices, in any dtype, for any processor. No vLLM here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

# Up to so many tokens a product of 16-bit numbers is slower than converting the weights and multiplying in float32.
FEW = 32


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: a view where they lie together, else their numbers, and `take` copies them."""

    of: torch.Tensor
    numbers: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        return self.of if self.numbers is None else self.of.index_select(0, self.numbers)


@dataclass(frozen=True)
class DenseRows:
    """The rows of some adapters, ready to be taken.

    a: those of A, ordered by slice. owners: (1, ranks), the slot that each of them is of. slices: the numbers of the
    slices that have any, in order; ranks: how many each has; b: the rows of its B; outs: of all slices.
    """

    a: Rows
    owners: torch.Tensor
    slices: tuple[int, ...]
    ranks: tuple[int, ...]
    b: tuple[Rows, ...]
    outs: tuple[int, ...]

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (tokens, in) times Aᵀ: (tokens, ranks)."""
        a = self.a.take()
        dtype = _dtype(a, x.shape[0], x.dtype)
        return torch.mm(x.to(dtype), a.to(dtype).t())

    def pick(self, tokens: torch.Tensor, ends: torch.dtype) -> torch.Tensor:
        """Return the columns of A (ranks, vocabulary) of some tokens, (tokens, ranks). ends: of the layer's output."""
        a = self.a.take()
        return a.index_select(1, tokens).t().to(_dtype(a, tokens.shape[0], ends))

    def grow(self, y: torch.Tensor, h: torch.Tensor, scale: float) -> None:
        """Add scale times h (tokens, ranks) times B to y (tokens, out), in the dtype of h, rounded to y's once."""
        if scale != 1.0:
            h.mul_(scale)
        target = y if y.dtype == h.dtype else torch.zeros(y.shape, dtype=h.dtype, device=y.device)
        parts = target.split_with_sizes(self.outs, 1)
        for index, part, b in zip(self.slices, h.split_with_sizes(self.ranks, 1), self.b, strict=True):
            parts[index].addmm_(part, b.take().to(h.dtype))
        if target is not y:
            y.add_(target)


class DenseStore:
    """A: (room of all slices, in), by slice. B: for each slice (its room, its out). What is not used is zero."""

    def __init__(
        self,
        room: Sequence[int],
        wide: int,
        outs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.A = torch.zeros(sum(room), wide, dtype=dtype, device=device)
        self.B = tuple(torch.zeros(rows, out, dtype=dtype, device=device) for rows, out in zip(room, outs, strict=True))
        self._outs = tuple(outs)
        self._first = tuple(sum(room[:index]) for index in range(len(room)))
        self._held: list[dict[int, tuple[int, int]]] = [{} for _ in room]  # slice -> slot -> start, stop

    @property
    def held_bytes(self) -> int:
        return self.A.nbytes + sum(b.nbytes for b in self.B)

    def put(self, slot: int, factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take in an adapter. factors: A (r, <= in) and B (r, <= out) of the slices that it has."""
        for index, (a, b) in factors.items():
            start = self._used(index)
            stop, first = start + a.shape[0], self._first[index]
            self.A[first + start : first + stop, : a.shape[1]] = a
            self.B[index][start:stop, : b.shape[1]] = b
            self._held[index][slot] = (start, stop)

    def remove(self, slot: int) -> None:
        """Forget an adapter; later rows move up."""
        for index, held in enumerate(self._held):
            if slot not in held:
                continue
            end, first = self._used(index), self._first[index]
            start, stop = held.pop(slot)
            count = stop - start
            _close_gap(self.A[first : first + end], start, count)
            _close_gap(self.B[index][:end], start, count)
            for other, (begin, last) in held.items():
                if begin >= stop:
                    held[other] = (begin - count, last - count)

    def part(self, slot: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one adapter's A (r, in) and B (r, out) of a slice that it has, as views."""
        start, stop = self._held[index][slot]
        first = self._first[index]
        return self.A[first + start : first + stop], self.B[index][start:stop]

    def select(self, slots: Sequence[int]) -> DenseRows | None:
        """Return the rows of these adapters; None for none at all."""
        rows: list[int] = []
        owners: list[int] = []
        parts: list[tuple[int, int, Rows]] = []
        for index, held in enumerate(self._held):
            ranges = sorted((*held[slot], slot) for slot in slots if slot in held)
            own = [row for start, stop, _ in ranges for row in range(start, stop)]
            if not own:
                continue
            parts.append((index, len(own), _rows(self.B[index], own)))
            rows += [self._first[index] + row for row in own]
            owners += [slot for start, stop, slot in ranges for _ in range(start, stop)]
        if not rows:
            return None
        slices, ranks, b = zip(*parts, strict=True)
        named = torch.tensor([owners], device=self.A.device)
        return DenseRows(_rows(self.A, rows), named, slices, ranks, b, self._outs)

    def _used(self, index: int) -> int:
        return max((stop for _, stop in self._held[index].values()), default=0)


def _rows(of: torch.Tensor, numbers: list[int]) -> Rows:
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return Rows(of[numbers[0] : numbers[-1] + 1])
    return Rows(of, torch.tensor(numbers, device=of.device))


def _close_gap(rows: torch.Tensor, start: int, count: int) -> None:
    rows[start : rows.shape[0] - count] = rows[start + count :].clone()
    rows[rows.shape[0] - count :] = 0


def _dtype(weight: torch.Tensor, tokens: int, ends: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in: the wider of the weight's and that of the layer's ends, or float32 where that is
    faster.
    """
    wide = torch.promote_types(weight.dtype, ends)
    return torch.float32 if tokens <= FEW or not has_products(wide) else wide


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has fast products of a dtype. Without them, PyTorch's are 10 times slower than float32."""
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype == torch.float32 or (dtype in known and bool(known[dtype]()))
