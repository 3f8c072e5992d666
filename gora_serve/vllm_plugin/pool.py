"""The LoRA weights of one layer on CPU: the ranks of all its adapters side by side, none padded to another's.

A packed layer (qkv, gate and up) has one slice for each of its projections, each with room for a fixed number of ranks.
How they lie in memory is a store's matter (`dense`, `packed`). No vLLM here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gora_serve.errors import BindingError
from gora_serve.vllm_plugin.dense import DenseRows, DenseStore
from gora_serve.vllm_plugin.kernel import fits_layout
from gora_serve.vllm_plugin.packed import PackedRows, PackedStore
from gora_serve.vllm_plugin.prepared import Prepared

Selected = DenseRows | PackedRows
KEPT = 64  # choices of adapters, and of numbers of tokens, that are remembered
SPARE = 4  # times the ranks asked for: where a pool has no more, all are multiplied


class RankPool:
    """A and B of several adapters. room: how many ranks each slice may have. wide: in features. outs: each slice's out
    features. packed: in the layout of vLLM's kernel (see `kernel.can_pack`). name: of the layer, for messages. Raises
    ValueError for what cannot be packed.
    """

    def __init__(
        self,
        room: Sequence[int],
        wide: int,
        outs: Sequence[int],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        packed: bool = False,
        name: str | None = None,
    ) -> None:
        self.name, self.dtype, self.wide, self.packed = name, dtype, wide, packed
        self.room, self.outs = tuple(room), tuple(outs)
        if packed and not fits_layout(wide, outs, dtype, device):
            raise ValueError(f"a layer of {wide} to {tuple(outs)} in {dtype} on {device} cannot be packed")
        self.store = PackedStore(wide, outs) if packed else DenseStore(room, wide, outs, dtype, device)
        self._ranks: dict[int, tuple[int, ...]] = {}  # slot -> rank of each slice
        self._selected: dict[tuple[int, ...], Selected | None] = {}
        self._prepared: dict[tuple[int, tuple[int, ...]], Prepared | None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all the ranks that there is room for, without what packing fills up."""
        return self.dtype.itemsize * sum(
            rows * (self.wide + out) for rows, out in zip(self.room, self.outs, strict=True)
        )

    def used(self, index: int) -> int:
        """Return how many ranks of a slice are in use."""
        return sum(ranks[index] for ranks in self._ranks.values())

    def rank(self, slot: int) -> tuple[int, ...]:
        """Return the ranks of an adapter, by slice."""
        return self._ranks.get(slot, (0,) * len(self.room))

    def put(self, slot: int, factors: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        """Replace what a slot holds. factors: for each slice A (r, <= in) and B (<= out, r), or None.

        They are finite (`fit.check_finite`): beside others, a NaN in B would spread to their tokens. Ranks whose row of
        A or column of B is all zero add nothing and are left out. Raises BindingError: GS-4801 where there is no room,
        GS-4804 for sizes of another base; then the slot is empty.
        """
        self.remove(slot)
        given = {index: pair for index, pair in enumerate(factors) if pair is not None}
        for index, (a, b) in given.items():
            self._check_sizes(index, a, b)
        used = {index: _without_zeros(*pair) for index, pair in given.items()}
        held = {index: (a, b.t()) for index, (a, b) in used.items() if a.shape[0]}
        ranks = tuple(held[index][0].shape[0] if index in held else 0 for index in range(len(self.room)))
        for index, rank in enumerate(ranks):
            self._check_room(index, rank)
        if held:
            self._forget()
            self.store.put(slot, held)
            self._ranks[slot] = ranks

    def _check_sizes(self, index: int, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.shape[1] > self.wide or b.shape[0] > self.outs[index] or a.shape[0] != b.shape[1]:
            raise BindingError(
                "the adapter's factors do not fit together, or are of another base", code="GS-4804", tensor=self.name,
                expected=f"A (r, {self.wide}), B ({self.outs[index]}, r)",
                actual=f"A {tuple(a.shape)}, B {tuple(b.shape)}", hint="serve it on the base that it was trained on",
            )  # fmt: skip

    def _check_room(self, index: int, rank: int) -> None:
        free = self.room[index] - self.used(index)
        if rank > free:
            raise BindingError(
                "the adapter's rank does not fit into this layer", code="GS-4801", tensor=self.name,
                expected=f"rank <= {free}", actual=rank, hint="start again with a larger --rank-headroom",
            )  # fmt: skip

    def remove(self, slot: int) -> None:
        """Forget what a slot holds."""
        if self._ranks.pop(slot, None) is not None:
            self._forget()
            self.store.remove(slot)

    def part(self, slot: int, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return one adapter's A (r, in) and B (r, out) of one slice, None where it has none."""
        return self.store.part(slot, index) if self.rank(slot)[index] else None

    def select(self, slots: tuple[int, ...]) -> Selected | None:
        """Return the ranks of several adapters at once, None where none of them has any in this layer."""
        if slots not in self._selected:
            self._selected[slots] = self.store.select(slots)
            _drop_oldest(self._selected)
        return self._selected[slots]

    def prepared(self, tokens: int, slots: tuple[int, ...]) -> Prepared | None:
        """Return the sum of so few tokens, of a packed pool; None where none of the adapters has any rank here.

        All ranks lie together. Where they are at most SPARE times those of the adapters, all are multiplied, and what
        is not asked for is dropped: that costs less than to copy some.
        """
        if (tokens, slots) not in self._prepared:
            own, every = sum(sum(self.rank(slot)) for slot in slots), sum(map(sum, self._ranks.values()))
            chosen = tuple(self._ranks) if every <= SPARE * own else slots
            rows = self.select(chosen) if own else None
            exact = set(chosen) <= set(slots)
            found = Prepared(rows, tokens, exact=exact) if isinstance(rows, PackedRows) else None
            self._prepared[tokens, slots] = found
            _drop_oldest(self._prepared)
        return self._prepared[tokens, slots]

    def _forget(self) -> None:
        self._selected.clear()
        self._prepared.clear()


def _drop_oldest(kept: dict[Any, Any]) -> None:
    if len(kept) > KEPT:
        del kept[next(iter(kept))]


class PooledStack(tuple):  # type: ignore[type-arg]
    """A layer's `lora_a_stacked`: one slot of rank 1 that tells vLLM the shapes, and the pool that has the weights."""

    pool: RankPool


def _without_zeros(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    used = (a != 0).any(1) & (b != 0).any(0)  # (r,); NaN is not 0
    return (a, b) if bool(used.all()) else (a[used], b[:, used])
