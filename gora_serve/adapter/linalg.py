"""Linear algebra on adapters: the same update in another shape. Values in, values out."""

from __future__ import annotations

import torch

from gora_serve.adapter.factors import LoraFactors


def fold_scale(factors: LoraFactors) -> LoraFactors:
    """Return the same update with scale 1: B becomes scale * B, rounded once in B's dtype."""
    return LoraFactors(factors.A, (factors.B.double() * factors.scale).to(factors.B.dtype), 1.0)


def pad_rank(factors: LoraFactors, rank: int) -> LoraFactors:
    """Return the same update at a larger rank: rows of zeros for A (r, in), columns of zeros for B (out, r)."""
    extra = rank - factors.rank
    if extra < 0:
        raise ValueError(f"cannot pad rank {factors.rank} down to {rank}")
    A = torch.cat([factors.A, factors.A.new_zeros(extra, factors.A.shape[1])])  # (rank, in)
    B = torch.cat([factors.B, factors.B.new_zeros(factors.B.shape[0], extra)], dim=1)  # (out, rank)
    return LoraFactors(A, B, factors.scale)
