"""Layers with adapters for the plugin's tests: a pool beside what was put into it, and what is right in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from gora_serve.vllm_plugin.pool import RankPool

WIDE = 24
Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, in), B (out, r)


@dataclass(frozen=True)
class Batch:
    """A layer's adapters by slot, for each slice a pair or None; the tokens' slots, x (tokens, in), y (tokens, out)."""

    adapters: Mapping[int, Sequence[Pair | None]]
    slots: tuple[int, ...]
    outs: tuple[int, ...]
    x: torch.Tensor
    y: torch.Tensor

    def pool(self, *, spare: int = 0, packed: bool = False) -> RankPool:
        room = [
            spare + sum(0 if pairs[index] is None else pairs[index][0].shape[0] for pairs in self.adapters.values())
            for index in range(len(self.outs))
        ]
        pool = RankPool(room, WIDE, self.outs, self.x.dtype, packed=packed)
        for slot, pairs in self.adapters.items():
            pool.put(slot, pairs)
        return pool


def right_sum(batch: Batch, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y + scale * x Aᵀ Bᵀ of each token's own adapter, and the sum of the magnitudes; both float64."""
    found, size = batch.y.double(), batch.y.double().abs()
    for token, slot in enumerate(batch.slots):
        start = 0
        for index, out in enumerate(batch.outs):
            pair = batch.adapters[slot][index] if slot in batch.adapters else None
            if pair is not None:
                a, b = pair[0].double(), pair[1].double()
                x = batch.x[token].double()
                found[token, start : start + out] += scale * (b @ (a @ x))
                size[token, start : start + out] += abs(scale) * (b.abs() @ (a.abs() @ x.abs()))
            start += out
    return found, size


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype, step: int = 1, *, whole: bool = False) -> Batch:
    """Up to 4 adapters in slots 0 to 5, ranks 0 to 9 (40 with steps) in 1 to 3 slices, and up to 70 tokens, some of
    them without an adapter.

    step: what every number of outputs is a multiple of. whole: values are -1, 0 and 1, and y is 0.
    """
    outs = tuple(step * number for number in draw(st.lists(st.integers(1, 12 // min(step, 4)), min_size=1, max_size=3)))
    taken = draw(st.lists(st.integers(0, 5), max_size=4, unique=True))
    most = 9 if step == 1 else 40
    ranks = {slot: [draw(st.integers(0, most)) for _ in outs] for slot in taken}
    runs = draw(st.lists(st.tuples(st.sampled_from([-1, *taken]), st.integers(1, 14)), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def values(*shape: int) -> torch.Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    adapters = {
        slot: [None if rank == 0 else (values(rank, WIDE), values(out, rank))
               for rank, out in zip(ranks[slot], outs, strict=True)]
        for slot in taken
    }  # fmt: skip
    slots = tuple(slot for slot, count in runs for _ in range(count))
    y = values(len(slots), sum(outs))
    return Batch(adapters, slots, outs, values(len(slots), WIDE), y * 0 if whole else y)
