"""Parts of a weight matrix that initialisations take out of it: the largest or smallest singular values, first columns.

On whole matrices (out, in), one at a time. Where an initialisation made the part in float32, the same routine is used,
so that the part is the same; elsewhere float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors


def principal(W: Tensor, rank: int) -> LoraFactors:
    """Return the best approximation of W, (out, in), of that rank, by the float32 SVD that initialisations use.

    Theirs and not a better one: where values are close, float32 turns the singular vectors by more than 1e-5.
    """
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return LoraFactors(Vh[:rank], U[:, :rank].double() * S[:rank], 1.0)


def minor(W: Tensor, rank: int) -> LoraFactors:
    """Return the part of W, (out, in), that belongs to its `rank` smallest singular values, by the same SVD."""
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return LoraFactors(Vh[-rank:], U[:, -rank:].double() * S[-rank:], 1.0)


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W in descending order, float64; good to 1e-8 of the largest."""
    squares: Tensor = torch.linalg.eigvalsh(_gram(W))  # ascending
    return squares.clamp(min=0).sqrt().flip(0)


def first_columns(W: Tensor, rank: int) -> LoraFactors:
    """Return the projection of W, (out, in), on the span of its first `rank` columns: Q_r R_r by the float32 QR.

    Of the whole W, as OLoRA has it: the QR of these columns alone rounds otherwise, which logits show at 1e-5.
    """
    Q, R = torch.linalg.qr(W.float())
    return LoraFactors(R[:rank], Q[:, :rank], 1.0)


def sharpened(W: Tensor, rounded: LoraFactors, iterations: int = 4) -> LoraFactors:
    """Return the principal part of W, (out, in), that `rounded` is but for rounding to 16 bits, without an SVD of W.

    Subspace iteration from the rounded rows: rounding points everywhere, and what lies far below the r-th singular
    value is gone after a step.
    """
    W = W.double()
    Q = torch.linalg.qr(rounded.A.double().T).Q  # (in, r)
    for _ in range(iterations):
        Q = torch.linalg.qr(W.T @ torch.linalg.qr(W @ Q).Q).Q
    return LoraFactors(Q.T, W @ Q, 1.0)


def nearest(D: Tensor, rank: int) -> LoraFactors:
    """Return the best approximation of D, (out, in), of that rank, where D is of that rank but for rounding.

    Subspace iteration (Halko, Martinsson, Tropp 2011) with a fixed seed: exact to rounding over a cliff in the
    spectrum, and no good for a flat one, which needs `principal`.
    """
    D = D.double()
    width = min(rank + 8, *D.shape)
    Q = torch.randn(D.shape[1], width, dtype=D.dtype, generator=torch.Generator().manual_seed(0))  # (in, width)
    for _ in range(4):
        Y = torch.linalg.qr(D @ Q).Q  # (out, width)
        Q = torch.linalg.qr(D.T @ Y).Q
    U, S, Vh = torch.linalg.svd(D @ Q, full_matrices=False)
    return LoraFactors(Vh[:rank] @ Q.T, U[:, :rank] * S[:rank], 1.0)


def transposed(factors: LoraFactors) -> LoraFactors:
    """Return the update of the transposed matrix: (in, out)."""
    return LoraFactors(factors.B.T, factors.A.T, factors.scale)


def nothing(shape: tuple[int, int]) -> LoraFactors:
    """Return an update of zeros for a module of shape (out, in)."""
    return LoraFactors(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1), 1.0)


def _gram(W: Tensor) -> Tensor:
    """W Wᵀ or Wᵀ W, whichever is smaller."""
    W = W.double()
    return W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
