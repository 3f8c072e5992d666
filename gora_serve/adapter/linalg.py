"""Linear algebra on adapters: the same update in another shape, or a smaller one. Values in, values out.

Sums, differences and truncations are exact in float64 and never build the (out, in) product of two thin factors:
QR of each side, then the singular values of the small core (r, r). Of updates of full rank `leading` finds the first
directions, with the norm of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors

# Of an update's norm: less than rounding to this dtype costs (unit roundoffs are 6e-8, 2e-3 and 5e-4).
NUMERICAL: Mapping[str, float] = {"float32": 1e-7, "bfloat16": 5e-4, "float16": 1e-4}


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


def stack(terms: Sequence[LoraFactors]) -> LoraFactors:
    """Return the sum of updates in float64, scale 1: A's (r_i, in) stacked, scale_i * B's (out, r_i) joined."""
    A = torch.cat([term.A.double() for term in terms])  # (r, in)
    B = torch.cat([term.B.double() * term.scale for term in terms], dim=1)  # (out, r)
    return LoraFactors(A, B, 1.0)


def subtract(trained: LoraFactors, initial: LoraFactors) -> LoraFactors:
    """Return trained - initial, in float64, at the sum of the two ranks.

    What training added to a module whose base was W0 - initial: the update on W0 itself. The two sides nearly cancel
    where training moved little, so round the result only after `compress`.
    """
    return stack([trained, LoraFactors(initial.A, initial.B, -initial.scale)])


@dataclass(frozen=True)
class Spectrum:
    """An update by its singular values: B[:, i] A[i] is its i-th best rank-one part, the value split evenly.

    A: (r, in) and B: (out, r) in float64, with orthogonal rows and columns. singular: (r,) descending, float64; r may
    be 0. rest: the Frobenius norm of what is not held, 0 but after `leading`. numerical_rank: how many values are more
    than the tolerance that was asked for; after `leading`, which looks for no more than some, the most that it can be.
    """

    A: Tensor
    B: Tensor
    singular: Tensor
    rest: float
    numerical_rank: int

    @property
    def rank(self) -> int:
        return self.singular.shape[0]

    def first(self, rank: int) -> LoraFactors:
        """Return the best update of that rank (Eckart and Young 1936). Raises InputError for rank 0."""
        return LoraFactors(self.A[:rank].contiguous(), self.B[:, :rank].contiguous(), 1.0)

    def dropped(self, rank: int) -> float:
        """Return the Frobenius norm of what `first(rank)` leaves out, which is orthogonal to the rest."""
        return math.hypot(float(self.singular[rank:].norm()), self.rest)


def compress(factors: LoraFactors, *, tolerance: float = 0.0) -> Spectrum:
    """Return the spectrum of scale * B @ A. Its numerical rank leaves out values that are together below `tolerance`.

    QR of B and of Aᵀ and the SVD of the core in float64, O((out + in) r²); a factor that is wider than long stays as it
    is. Values below float64's own noise, r * 2e-16 |B| |A|, are left out: what is left where two terms cancel. The
    tolerance is relative to the update's norm.
    """
    left, right = _triangle(factors.B.double() * factors.scale), _triangle(factors.A.double().T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)  # (k, k'), (k',), (k', l)
    noise = factors.rank * torch.finfo(S.dtype).eps * float(left.R.norm()) * float(right.R.norm())
    held = int((noise < S).sum())
    root = S[:held].sqrt()
    B = (left.Q @ U[:, :held]) * root  # (out, held)
    A = (right.Q @ Vh[:held].T).T * root[:, None]  # (held, in)
    numerical = _above(_tails(S[:held]), tolerance)
    return Spectrum(A.contiguous(), B.contiguous(), S[:held], 0.0, numerical)


def as_factors(delta: Tensor) -> LoraFactors:
    """Return an update (out, in) of full rank as factors: itself beside the identity, on its smaller side."""
    out_features, in_features = delta.shape
    identity = torch.eye(min(delta.shape), dtype=delta.dtype, device=delta.device)
    return LoraFactors(delta, identity, 1.0) if out_features <= in_features else LoraFactors(identity, delta, 1.0)


def leading(factors: LoraFactors, count: int, *, tolerance: float = 0.0, iterations: int = 4) -> Spectrum:
    """Return the first `count` directions of an update of full rank, without its whole SVD, and the norm of the rest.

    Randomized subspace iteration in float64 (Halko, Martinsson and Tropp 2011, algorithm 4.4, orthonormalized at every
    step; 16 directions more than asked for; a fixed seed). On a flat spectrum they are not quite the best: 0.2 % more
    was left out of random matrices. What is said of them is exact: they are a projection of the update, so that the
    norm beyond the first r is √(|delta|² - Σ_{i<=r} σ_i²) for every r. `compress` where that is no more work.
    tolerance: as `compress` has it.
    """
    wanted = count + 16
    if factors.rank < min(factors.shape) or 2 * wanted >= min(factors.shape):
        return compress(factors, tolerance=tolerance)
    M = _product(factors)  # (out, in)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(M @ torch.randn(M.shape[1], wanted, dtype=M.dtype, generator=generator)).Q  # (out, wanted)
    for _ in range(iterations):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)  # (wanted, wanted), (wanted,), (wanted, in)
    total = float(M.norm())
    U, S, Vh = U[:, :count], S[:count], Vh[:count]
    noise = max(M.shape) * torch.finfo(S.dtype).eps * total
    held = int((noise < S).sum())
    missing = _difference_of_squares(total, float(S[:held].norm()))
    tails = torch.hypot(_tails(S[:held]), torch.tensor(missing, dtype=S.dtype))
    numerical = _above(tails, tolerance)
    root = S[:held].sqrt()
    A, B = Vh[:held] * root[:, None], (Q @ U[:, :held]) * root
    known = numerical < held or missing == 0
    return Spectrum(A.contiguous(), B.contiguous(), S[:held], missing, numerical if known else min(M.shape))


def full_update(factors: LoraFactors) -> Tensor | None:
    """Return the update (out, in) in float64 where it is of full rank, as `as_factors` holds it; None elsewhere."""
    for one, other in ((factors.A, factors.B), (factors.B, factors.A)):
        if one.shape[0] == one.shape[1] and torch.equal(one, torch.eye(one.shape[0], dtype=one.dtype)):
            return other.double() * factors.scale
    return None


def _product(factors: LoraFactors) -> Tensor:
    """Return delta (out, in) in float64, without multiplying by an identity."""
    full = full_update(factors)
    return factors.delta() if full is None else full


def _difference_of_squares(whole: float, part: float) -> float:
    """Return √(whole² - part²), and 0 where that is rounding: below √eps of the whole."""
    rest = math.sqrt(max((whole - part) * (whole + part), 0.0))
    return rest if rest > 3e-8 * whole else 0.0


@dataclass(frozen=True)
class _Triangle:
    """M = Q R; where M is wider than long, Q is the identity and R is M."""

    Q: Tensor
    R: Tensor


def _triangle(M: Tensor) -> _Triangle:
    if M.shape[0] <= M.shape[1]:
        return _Triangle(torch.eye(M.shape[0], dtype=M.dtype, device=M.device), M)
    Q, R = torch.linalg.qr(M)
    return _Triangle(Q, R)


def _tails(S: Tensor) -> Tensor:
    """Return the norm of what is left from each value on, and after the last: (k + 1,)."""
    return torch.cat([S.square().flip(0).cumsum(0).flip(0).sqrt(), S.new_zeros(1)])


def _above(tails: Tensor, tolerance: float) -> int:
    """Return how many values cannot be left out: what is left from them on is above the tolerance."""
    return int((tails[:-1] > tolerance * tails[0]).sum())


def norm(factors: LoraFactors) -> float:
    """Return the Frobenius norm of the update."""
    return float(compress(factors).singular.norm())


def distance(one: LoraFactors, other: LoraFactors) -> float:
    """Return the Frobenius norm of one - other, by QR of the stacked factors (no cancellation of squares)."""
    return norm(subtract(one, other))
