"""How the updates of one module become one: the formulas of `merge --into adapter`. Pure: factors in, factors out.

All of them work on the updates themselves, scale * B @ A, never on A and B apart: (Σ B)(Σ A) is not Σ B A, and the
entries of a factor mean nothing by themselves. Nothing depends on the order of the terms, bit for bit: they are summed
in the order of their digests.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors, raw_bytes
from gora_serve.adapter.linalg import as_factors, stack

DENSITY = {"ties": 0.2, "dare": 0.5}  # what is kept where nothing is said; TIES: its paper's k = 20 %


@dataclass(frozen=True)
class Term:
    """One adapter's update of a module, and its weight."""

    factors: LoraFactors
    weight: float

    @property
    def weighted(self) -> LoraFactors:
        return LoraFactors(self.factors.A, self.factors.B, self.factors.scale * self.weight)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the factors' types and bytes and of the scale, without the weight."""
        found = hashlib.sha256(repr((self.factors.scale, self.factors.A.shape)).encode())
        for tensor in (self.factors.A, self.factors.B):
            found.update(str(tensor.dtype).encode())
            found.update(raw_bytes(tensor))
        return found.digest()

    def task_vector(self) -> Tensor:
        """Return weight * scale * B @ A, (out, in), in float64."""
        return self.weighted.delta()


def in_order(terms: Sequence[Term]) -> list[Term]:
    """Return the terms in an order that does not depend on the one they come in."""
    return sorted(terms, key=lambda term: (term.digest, term.weight))


def summed(terms: Sequence[Term]) -> LoraFactors:
    """Return Σ weight * update, exactly, at the sum of the ranks; copies of one update are one term, and cancel."""
    copies: dict[bytes, list[Term]] = {}
    for term in in_order(terms):
        copies.setdefault(term.digest, []).append(term)
    return stack([Term(same[0].factors, math.fsum(one.weight for one in same)).weighted for same in copies.values()])


def ties(terms: Sequence[Term], density: float) -> LoraFactors:
    """Return TIES of the task vectors τ_t = weight_t * update_t, at full rank (Yadav et al. 2023, section 3, alg. 1).

    Trim: of each τ_t the share `density` of largest magnitude stays, the rest is zero. Elect: γ = sgn(Σ_t τ̂_t), entry
    by entry. Merge: the mean of those τ̂_t whose sign is γ, the entries that were trimmed left out of the count.
    Departures: trimmed module by module, not over all of them at once; the weights stand where the paper has one λ for
    all, so that a weight of w in every term is λ = w. Law: one term at density 1 is itself. At no time are more than
    four (out, in) tensors in memory, whatever the number of terms.
    """
    ordered = in_order(terms)
    elected = torch.zeros(ordered[0].factors.shape, dtype=torch.float64)
    for trimmed in _trimmed(ordered, density):
        elected += trimmed
    elected.sign_()
    total, count = torch.zeros_like(elected), torch.zeros(elected.shape, dtype=torch.int32)
    for trimmed in _trimmed(ordered, density):
        agrees = trimmed.sign() == elected
        total += trimmed * agrees
        count += agrees
    return as_factors(total.div_(count.clamp_(min=1)))


def _trimmed(terms: Sequence[Term], density: float) -> Iterator[Tensor]:
    return (trim(term.task_vector(), density) for term in terms)


def trim(delta: Tensor, density: float) -> Tensor:
    """Return the update (out, in) with only the share `density` of largest magnitude; equal ones stay together."""
    kept = max(1, round(density * delta.numel()))
    if kept >= delta.numel():
        return delta
    magnitude = delta.abs()
    threshold = magnitude.flatten().kthvalue(delta.numel() - kept + 1).values
    return delta * (magnitude >= threshold)


def dare(terms: Sequence[Term], density: float, seed: int, path: str) -> LoraFactors:
    """Return Σ weight_t * DARE(update_t), at full rank (Yu et al. 2024, section 3.1, eq. 1 and 2).

    Drop And REscale: each entry is kept with probability 1 - p = density, independently, and divided by it; so the
    expectation is the plain sum, and at density 1 it is the sum itself. What is dropped follows from seed, module and
    the update's own bytes: it is the same on every machine, in any order, and for two copies of an adapter.
    """
    if density >= 1:
        return summed(terms)
    total = torch.zeros(terms[0].factors.shape, dtype=torch.float64)
    for term in in_order(terms):
        generator = torch.Generator().manual_seed(_seed(seed, path, term.digest))
        kept = torch.rand(total.shape, generator=generator) < density
        total += term.task_vector().mul_(kept).div_(density)
    return as_factors(total)


def _seed(seed: int, path: str, digest: bytes) -> int:
    found = hashlib.sha256(f"{seed}\0{path}\0".encode() + digest).digest()
    return int.from_bytes(found[:8], "big") >> 1


Method = Callable[[str, Sequence[Term]], LoraFactors]  # module path, terms -> the merged update


def method_named(name: str, *, density: float | None, seed: int) -> Method:
    """Return the formula; `linear` and `svd` are sums too, and differ in the weights and in the rank."""
    share = DENSITY.get(name, 1.0) if density is None else density
    if name == "ties":
        return lambda path, terms: ties(terms, share)
    if name == "dare":
        return lambda path, terms: dare(terms, share, seed, path)
    return lambda path, terms: summed(terms)
