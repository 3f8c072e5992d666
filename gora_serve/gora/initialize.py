"""The starting adapter (paper, section 3.3): A is random, B is the compressed gradient.

Sign: the paper's, descent. B carries the minus, so that the first forward pass already sees one gradient step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gora_serve.errors import InputError


def draw_A(shape: tuple[int, int], rank_max: int, generator: torch.Generator) -> Tensor:
    """Draw A_max, (k, in) with k = min(rank_max, out, in), in float32 on the CPU.

    Kaiming uniform with a = √5, as PEFT draws lora_A: uniform in ±1/√in. A module of rank r uses the first r
    rows, so its A does not depend on the ranks of the plan (but on rank_max, where several modules are drawn from one
    generator).
    """
    out_features, in_features = shape
    k = min(rank_max, out_features, in_features)
    bound = 1.0 / math.sqrt(in_features)
    return torch.empty(k, in_features).uniform_(-bound, bound, generator=generator)


def rank_stabilized_scale(alpha: float, rank: int) -> float:
    """Forward scale α / √r (paper, end of section 3.3, after rsLoRA)."""
    return alpha / math.sqrt(rank)


def initialize(A_max: Tensor, compressed: Tensor, *, rank: int, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) of one module: A is the first `rank` rows of A_max, B = -ξ G Aᵀ (A Aᵀ)⁻¹ (equations 9, 10).

    A_max: (k, in). compressed: S = G A_maxᵀ, (out, k). Result: A (rank, in), B (out, rank), float32.

    ξ = γ √in / α, so that with the forward scale α / √rank the first update is
    -γ √(in / rank) * (G projected on the rows of A), of expected size γ |G|. B is linear in γ.
    The solve is a Cholesky factorisation in float64. Raises torch.linalg.LinAlgError if A's rows are dependent, and
    InputError if A_max has fewer than `rank` rows.
    """
    if rank > A_max.shape[0]:
        raise InputError(
            "the probe's A_max has too few rows for this rank", code="GS-395", expected=f"at most {A_max.shape[0]}",
            actual=rank, hint="probe again with a larger rank_max, the largest rank that may be allocated",
        )  # fmt: skip
    A = A_max[:rank]  # (r, in)
    gram = A.double() @ A.double().T  # (r, r)
    projected = torch.cholesky_solve(compressed[:, :rank].double().T, torch.linalg.cholesky(gram)).T  # (out, r)
    xi = gamma * math.sqrt(A.shape[1]) / alpha
    return A.clone(), (-xi * projected).float()
