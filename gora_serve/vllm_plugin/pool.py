"""The LoRA weights of one layer on CPU: the ranks of all its adapters side by side, without padding.

A packed layer (qkv, gate and up) has one slice for each of its projections. Rows of `A` are ordered by slice, then in
the order in which adapters came; there is room for a fixed number of them. No vLLM here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gora_serve.errors import BindingError


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: a view where they lie together, else their numbers, and `take` copies them."""

    of: torch.Tensor
    numbers: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        return self.of if self.numbers is None else self.of.index_select(0, self.numbers)


@dataclass(frozen=True)
class Selected:
    """The rows of the adapters that a batch has, ready to be taken.

    a: those of A, ordered by slice. owners: (1, ranks), the slot that each of them is of. slices: the numbers of the
    slices that have any, in order; ranks: how many each has; b: the rows of its B.
    """

    a: Rows
    owners: torch.Tensor
    slices: tuple[int, ...]
    ranks: tuple[int, ...]
    b: tuple[Rows, ...]


class RankPool:
    """A: (room, in). B: for each slice (its room, its out). room: rows of each slice. outs: each slice's out features.

    What is not in use is zero. name: of the layer, for messages.
    """

    def __init__(
        self,
        room: Sequence[int],
        wide: int,
        outs: Sequence[int],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        name: str | None = None,
    ) -> None:
        self.name = name
        self.room, self.outs = tuple(room), tuple(outs)
        self.A = torch.zeros(sum(room), wide, dtype=dtype, device=device)  # (room, in)
        self.B = tuple(
            torch.zeros(rows, out, dtype=dtype, device=device) for rows, out in zip(room, outs, strict=True)
        )  # (room of the slice, out of the slice)
        self._first = tuple(sum(self.room[:index]) for index in range(len(self.room)))
        self._held: list[dict[int, tuple[int, int]]] = [{} for _ in self.room]  # slice -> slot -> start, stop
        self._selected: dict[tuple[int, ...], Selected | None] = {}

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + sum(b.nbytes for b in self.B)

    def used(self, index: int) -> int:
        """Return how many rows of a slice are in use."""
        return max((stop for _, stop in self._held[index].values()), default=0)

    def rank(self, slot: int) -> tuple[int, ...]:
        """Return the ranks of an adapter, by slice."""
        ranges = [held.get(slot, (0, 0)) for held in self._held]
        return tuple(stop - start for start, stop in ranges)

    def put(self, slot: int, factors: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        """Replace what a slot holds. factors: for each slice A (r, <= in) and B (<= out, r), or None.

        Ranks whose row of A or column of B is all zero add nothing and are left out. Raises BindingError: GS-4801 where
        there is no room, GS-4802 for values that are not finite in the engine's dtype; then the slot is empty.
        """
        self.remove(slot)
        given = [None if pair is None else _without_zeros(*pair) for pair in factors]
        for index, pair in enumerate(given):
            if pair is not None:
                self._check(index, *pair)
        for index, pair in enumerate(given):
            if pair is not None and pair[0].shape[0]:
                self._append(index, slot, *pair)

    def _check(self, index: int, a: torch.Tensor, b: torch.Tensor) -> None:
        free = self.room[index] - self.used(index)
        if a.shape[0] > free:
            raise BindingError(
                "the adapter's rank does not fit into this layer", code="GS-4801", tensor=self.name,
                expected=f"rank <= {free}", actual=a.shape[0], hint="start again with a larger --rank-headroom",
            )  # fmt: skip
        if not (a.to(self.A.dtype).isfinite().all() and b.to(self.A.dtype).isfinite().all()):
            raise BindingError(
                f"the adapter has values that are not finite in {self.A.dtype}", code="GS-4802",
                tensor=self.name, hint="train or convert the adapter again, or serve with --dtype float32",
            )  # fmt: skip

    def _append(self, index: int, slot: int, a: torch.Tensor, b: torch.Tensor) -> None:
        start = self.used(index)
        stop = start + a.shape[0]
        first = self._first[index]
        self.A[first + start : first + stop, : a.shape[1]] = a
        self.B[index][start:stop, : b.shape[0]] = b.t()
        self._held[index][slot] = (start, stop)

    def remove(self, slot: int) -> None:
        """Forget what a slot holds; later rows move up."""
        self._selected.clear()
        for index, held in enumerate(self._held):
            if slot not in held:
                continue
            start, stop = held.pop(slot)
            end, count = max([stop, *(last for _, last in held.values())]), stop - start
            first = self._first[index]
            _close_gap(self.A[first : first + end], start, count)
            _close_gap(self.B[index][:end], start, count)
            for other, (begin, last) in held.items():
                if begin >= stop:
                    held[other] = (begin - count, last - count)

    def part(self, slot: int, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return one adapter's A (r, in) and B (r, out) of one slice as views, None where it has none."""
        start, stop = self._held[index].get(slot, (0, 0))
        if start == stop:
            return None
        first = self._first[index]
        return self.A[first + start : first + stop], self.B[index][start:stop]

    def select(self, slots: tuple[int, ...]) -> Selected | None:
        """Return the rows of several adapters at once, None where none of them has any in this layer."""
        if slots not in self._selected:
            if len(self._selected) > 64:
                self._selected.clear()
            self._selected[slots] = self._select(slots)
        return self._selected[slots]

    def _select(self, slots: Sequence[int]) -> Selected | None:
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
        return Selected(_rows(self.A, rows), torch.tensor([owners], device=self.A.device), slices, ranks, b)


class PooledStack(tuple):  # type: ignore[type-arg]
    """A layer's `lora_a_stacked`: one slot of rank 1 that tells vLLM the shapes, and the pool that has the weights."""

    pool: RankPool


def _rows(of: torch.Tensor, numbers: list[int]) -> Rows:
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return Rows(of[numbers[0] : numbers[-1] + 1])
    return Rows(of, torch.tensor(numbers, device=of.device))


def _without_zeros(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    used = (a != 0).any(1) & (b != 0).any(0)  # (r,); NaN is not 0
    return (a, b) if bool(used.all()) else (a[used], b[:, used])


def _close_gap(rows: torch.Tensor, start: int, count: int) -> None:
    rows[start : rows.shape[0] - count] = rows[start + count :].clone()
    rows[rows.shape[0] - count :] = 0
