"""What a probe measures of each module, and the importance of equation 5 and table 6.

A weight gradient is Σ dYᵀ X over the tokens of one linear layer. `ExactGradient` adds these products up;
`finish` turns the sum into the small value that all later stages need: the importance and G A_maxᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gora_serve.config import Importance


@dataclass(frozen=True)
class ModuleStatistics:
    """One module's statistics.

    shape: (out, in). importance: by metric name. A: (k, in), the drawn A_max. compressed: S = G Aᵀ, (out, k).
    gradient_norm: |G| (Frobenius).
    """

    shape: tuple[int, int]
    importance: Mapping[Importance, float]
    A: Tensor
    compressed: Tensor
    gradient_norm: float


@dataclass(frozen=True)
class GradientStatistics:
    """What the probe hands on: the statistics of each module, and how much data they are made of."""

    mode: str
    modules: Mapping[str, ModuleStatistics]
    steps: int
    samples: int
    tokens: int
    loss: float

    def importances(self, metric: Importance) -> dict[str, float]:
        return {path: module.importance[metric] for path, module in self.modules.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {path: module.shape for path, module in self.modules.items()}


def sensitivity(W: Tensor, G: Tensor) -> float:
    """Equation 5: I = avg(|W ⊙ G|). W, G: (out, in). Linear in G's size; not negative."""
    return float((W.to(G.dtype) * G).abs().mean(dtype=torch.float64))


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
    """The full gradient of one module, added up in float32 on `device`.

    One per probed module, owned by the probe's loop and dropped when it is finished.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)  # (out, in)

    def add(self, dY: Tensor, X: Tensor) -> None:
        """Add dYᵀ X. dY: (..., out), the gradient of the loss by the layer's output; X: (..., in), its input."""
        dY = dY.reshape(-1, dY.shape[-1]).float()  # (tokens, out)
        X = X.reshape(-1, X.shape[-1]).float()  # (tokens, in)
        if self.total.device == dY.device:
            self.total.addmm_(dY.T, X)
        else:
            self.total.add_((dY.T @ X).to(self.total.device))


def finish(total: Tensor, W: Tensor, A: Tensor, *, count: int, metrics: tuple[Importance, ...]) -> ModuleStatistics:
    """Turn a summed gradient into statistics: G = total / count (algorithm 1, line 8).

    total, W: (out, in); A: (k, in); count: the number of micro-batches. The mean is taken in place.
    """
    G = total.div_(count)  # (out, in)
    return ModuleStatistics(
        shape=(G.shape[0], G.shape[1]),
        importance={metric: METRICS[metric](W.to(G.device), G) for metric in metrics},
        A=A.cpu(),
        compressed=(G @ A.to(G.device, G.dtype).T).cpu(),  # (out, k)
        gradient_norm=float(torch.linalg.vector_norm(G, dtype=torch.float64)),
    )
