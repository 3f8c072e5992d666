"""What a probe measures of each module, and the importance of equation 5 and table 6.

A weight gradient is Σ dYᵀ X over the tokens of one linear layer. `ExactGradient` adds these products up and turns
the sum into the small value that all later stages need: the importance and G A_maxᵀ. sketch.py does so without
the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gora_serve.config import Importance

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over processes


def alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True)
class ModuleStatistics:
    """One module's statistics.

    shape: (out, in). importance: by metric name. A: (k, in), the drawn A_max. compressed: S = G Aᵀ, (out, k).
    gradient_norm: |G| (Frobenius). importance_error: the relative standard error of the importance, 0 where every
    row was seen. rows: of how many rows of G the importance is made.
    """

    shape: tuple[int, int]
    importance: Mapping[Importance, float]
    A: Tensor
    compressed: Tensor
    gradient_norm: float
    importance_error: float = 0.0
    rows: int | None = None


@dataclass(frozen=True)
class GradientStatistics:
    """What the probe hands on: the statistics of each module, and how much data they are made of."""

    mode: str
    modules: Mapping[str, ModuleStatistics]
    steps: int
    samples: int
    tokens: int
    loss: float
    stopped_early: bool = False

    def importances(self, metric: Importance) -> dict[str, float]:
        return {path: module.importance[metric] for path, module in self.modules.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {path: module.shape for path, module in self.modules.items()}


class Gradient(Protocol):
    """The gradient of one module while a probe adds to it, whole or sketched."""

    def add(self, dY: Tensor, X: Tensor) -> None:
        """Add dYᵀ X. dY: (..., out), the gradient of the loss by the layer's output; X: (..., in), its input."""

    def importance(self, W: Tensor, metric: Importance, *, count: int, reduce: Reduce) -> float:
        """Return the importance by the mean over `count` additions so far, all processes together. W: (out, in)."""

    def finish(
        self, W: Tensor, metrics: tuple[Importance, ...], *, count: int, reduce: Reduce = alone
    ) -> ModuleStatistics:
        """Return the statistics of the mean gradient, G = sum / count (algorithm 1, line 8). W: (out, in)."""


def sensitivity(W: Tensor, G: Tensor) -> float:
    """Equation 5: I = avg(|W ⊙ G|). W, G: (out, in). Linear in G's size; not negative."""
    return float((W.to(G.dtype) * G).abs_().mean(dtype=torch.float64))


def sensitivity_nuclear(W: Tensor, G: Tensor) -> float:
    """Table 6: ‖W ⊙ G‖_*, the sum of the singular values. W, G: (out, in)."""
    return float(torch.linalg.svdvals(W.to(G.dtype) * G).sum(dtype=torch.float64))


def gradient_nuclear(W: Tensor, G: Tensor) -> float:
    """Table 6: ‖G‖_*. W, G: (out, in); W takes no part."""
    return float(torch.linalg.svdvals(G).sum(dtype=torch.float64))


METRICS = {
    "sensitivity": sensitivity,
    "sensitivity-nuclear": sensitivity_nuclear,
    "gradient-nuclear": gradient_nuclear,
}


class ExactGradient:
    """The full gradient of one module, added up in float32 on `device`. A: (k, in), the drawn A_max.

    The product of a micro-batch is rounded to the dtype of `operands`, as a weight gradient of autograd is: in bfloat16
    by 2^-8 at most of each entry, up and down alike.
    One per probed module, owned by the probe's loop and dropped when it is finished.
    """

    def __init__(self, shape: tuple[int, int], A: Tensor, device: torch.device) -> None:
        self.A = A
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)  # (out, in)

    def add(self, dY: Tensor, X: Tensor) -> None:
        dY, X = operands(dY, X)
        if (self.total.device, self.total.dtype) == (dY.device, dY.dtype):
            self.total.addmm_(dY.T, X)
        else:
            self.total.add_((dY.T @ X).to(self.total.device))

    def importance(self, W: Tensor, metric: Importance, *, count: int, reduce: Reduce) -> float:
        total = reduce(self.total)
        return METRICS[metric](W.to(total.device), total) / count

    def finish(
        self, W: Tensor, metrics: tuple[Importance, ...], *, count: int, reduce: Reduce = alone
    ) -> ModuleStatistics:
        """Return the statistics of G = sum / count, every metric from the whole matrix."""
        G = reduce(self.total) / count  # (out, in)
        return ModuleStatistics(
            shape=(G.shape[0], G.shape[1]),
            importance={metric: METRICS[metric](W.to(G.device), G) for metric in metrics},
            A=self.A,
            compressed=(G @ self.A.to(G.device).T).cpu(),  # (out, k)
            gradient_norm=float(torch.linalg.vector_norm(G, dtype=torch.float64)),
            rows=G.shape[0],
        )


def operands(dY: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return dY, (tokens, out), and X, (tokens, in), of (..., out) and (..., in), in the dtype of their product.

    That is dY's, beside which X is wider under autocast; but float32 for float16, in which small gradients vanish.
    """
    dtype = torch.float32 if dY.dtype == torch.float16 else dY.dtype
    return dY.reshape(-1, dY.shape[-1]).to(dtype), X.reshape(-1, X.shape[-1]).to(dtype)
