"""The gradient of a module without an (out, in) matrix: S = G A_maxᵀ, and a sample of G's rows.

B of equation 10 needs G only as G A_maxᵀ, so it follows from S exactly. The importance of equation 5 is a mean over
all entries of |W ⊙ G|; it is estimated from the rows R = G[rows]. Rows differ a lot, so they are drawn with unequal
chances and weighed against an auxiliary value that is known for every row (a ratio estimator; Särndal, Swensson and
Wretman, *Model Assisted Survey Sampling*, 1992, sections 3.6 and 5.6):

    x_o = |S_o| Σ_i |W_oi| c_i        c_i: the root mean square of the sampled rows' entry i
    Σ_o y_o ≈ Σ_o x_o * Σ_s (y_s / π_s) / Σ_s (x_s / π_s)        y_o = Σ_i |W_oi G_oi|, π_s: the chance of row s
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gora_serve.config import Importance
from gora_serve.gora.statistics import ModuleStatistics, Reduce, alone, operands

ROWS_STEP = 32  # samples are multiples of it: oneDNN keeps a compiled product for each size, over a megabyte
PILOT_ROWS = 64  # enough to see how much rows differ


@dataclass(frozen=True)
class RowSample:
    """Rows of a gradient, (n,), increasing, and the chance with which each was drawn, (n,), float64."""

    rows: Tensor
    chances: Tensor


@dataclass(frozen=True)
class Estimate:
    """An importance, and its relative standard error."""

    importance: float
    error: float


class SketchedGradient:
    """S = G Aᵀ, (out, k), and R = G[sample.rows], (n, in), added up in float32 on `device`. A: (k, in).

    The products of a micro-batch are rounded to the dtype of `operands`, as a weight gradient of autograd is: in
    bfloat16 S differs by some 1e-3 from that of a gradient in float32, in float32 by some 1e-7.
    """

    def __init__(self, shape: tuple[int, int], A: Tensor, sample: RowSample, device: torch.device) -> None:
        self.shape, self.A, self.sample = shape, A, sample
        self.S = torch.zeros(shape[0], A.shape[0], device=device)  # (out, k)
        self.R = torch.zeros(len(sample.rows), shape[1], device=device)  # (n, in)
        self._A = A.to(device)
        self._rows = sample.rows.to(device)

    def add(self, dY: Tensor, X: Tensor) -> None:
        dY, X = operands(dY, X)
        chosen = dY.T.index_select(0, self._rows)  # (n, tokens); picking columns of dY is several times slower
        self.S += dY.T @ (X @ self._A.to(X.dtype).T)
        self.R += chosen @ X

    def importance(self, W: Tensor, metric: Importance, *, count: int, reduce: Reduce) -> float:
        return self.estimate(W, reduce(self.S), reduce(self.R)).importance / count

    def finish(
        self, W: Tensor, metrics: tuple[Importance, ...], *, count: int, reduce: Reduce = alone
    ) -> ModuleStatistics:
        """Return the statistics of G = sum / count. Of the metrics a sketch knows sensitivity alone."""
        S, R = reduce(self.S) / count, reduce(self.R) / count
        estimate = self.estimate(W, S, R)
        return ModuleStatistics(
            shape=self.shape,
            importance={"sensitivity": estimate.importance},
            A=self.A,
            compressed=S.cpu(),
            gradient_norm=_frobenius_norm(S, R, self.sample),
            importance_error=estimate.error,
            rows=len(self.sample.rows),
        )

    def estimate(self, W: Tensor, S: Tensor, R: Tensor) -> Estimate:
        """Estimate mean |W ⊙ G| from G's sketch S (out, k) and its sampled rows R (n, in)."""
        y, x = _row_sums(W, S, R, self.sample)
        entries = self.shape[0] * self.shape[1]
        if len(y) == self.shape[0]:
            return Estimate(float(y.sum()) / entries, 0.0)
        chances, chosen = self.sample.chances.to(x.device), x[self._rows]
        weighed = float((chosen / chances).sum())
        if weighed == 0.0:
            return Estimate(0.0, 0.0)
        ratio = float((y / chances).sum()) / weighed
        residual = (y - ratio * chosen) / chances
        error = float(((1 - chances) * residual.square()).sum().sqrt()) / (ratio * weighed) if ratio else 0.0
        return Estimate(ratio * float(x.sum()) / entries, error)

    def choose_rows(self, W: Tensor, *, error: float, generator: torch.Generator, reduce: Reduce = alone) -> RowSample:
        """Take this gradient as the pilot: draw the rows with which the importance's standard error is at most `error`.

        The chance of a row is in proportion to |S_o| |W_o|; the number of rows follows from how much y / x differs
        between the pilot's rows, with the correction for a finite number of rows, and is rounded up to a multiple of
        ROWS_STEP. A pilot that says nothing, of zeros or not finite, gives PILOT_ROWS at even chances.
        """
        S, R = reduce(self.S), reduce(self.R)
        y, x = _row_sums(W, S, R, self.sample)
        out = self.shape[0]
        sizes = (S.norm(dim=1) * W.to(S.device, torch.float32).norm(dim=1)).double().cpu()  # (out,)
        total, needed = float(sizes.sum()), (_spread(y, x[self._rows]) / error) ** 2
        if total == 0.0 or not math.isfinite(total + needed):
            return draw_rows(torch.ones(out), PILOT_ROWS, generator)
        count = math.ceil(needed / (1 + needed / out) / ROWS_STEP) * ROWS_STEP
        return draw_rows(sizes, max(ROWS_STEP, count), generator)


def _spread(y: Tensor, x: Tensor) -> float:
    """Return the relative deviation of y / x, weighed by x; infinite of fewer than two ratios. y, x: (n,)."""
    ratios = (y / x)[x > 0]
    if len(ratios) < 2:
        return math.inf
    weights = x[x > 0] / x.sum()
    mean = float((weights * ratios).sum())
    return float((weights * (ratios - mean).square()).sum().sqrt()) / mean if mean else 0.0


def _row_sums(W: Tensor, S: Tensor, R: Tensor, sample: RowSample) -> tuple[Tensor, Tensor]:
    """Return y of the sampled rows, (n,), and x of all rows, (out,), in float64. W: (out, in)."""
    rows = sample.rows.to(R.device)
    W = W.to(R.device)
    y = (W[rows] * R).abs_().sum(dim=1, dtype=torch.float64)
    chances = sample.chances.to(R.device, R.dtype)
    c = (R.square() / chances[:, None]).sum(dim=0).sqrt()  # (in,)
    x = S.norm(dim=1) * (W.float().abs() @ c)
    return y, x.double()


def _frobenius_norm(S: Tensor, R: Tensor, sample: RowSample) -> float:
    """|G|, from the sampled rows: the sum over s of |R_s|² / π_s, scaled by what the sketch says of all rows."""
    chances = sample.chances.to(R.device)
    squares = R.square().sum(dim=1, dtype=torch.float64) / chances
    sketched = S.square().sum(dim=1, dtype=torch.float64)  # (out,)
    seen = float((sketched[sample.rows.to(S.device)] / chances).sum())
    return float((squares.sum() * sketched.sum() / seen).sqrt()) if seen else 0.0


def draw_rows(sizes: Tensor, count: int, generator: torch.Generator) -> RowSample:
    """Draw `count` of the rows without replacement, each with a chance in proportion to its size, (out,).

    Systematic sampling along a random order. Rows so large that the chance would reach 1 are taken for certain;
    a floor of a tenth of the mean size keeps any row from being all but impossible.
    """
    out = len(sizes)
    if count >= out:
        return RowSample(torch.arange(out), torch.ones(out, dtype=torch.float64))
    sizes = sizes.double().clamp(min=0.1 * float(sizes.double().mean()) or 1.0)
    chances = _chances(sizes, count)
    order = torch.randperm(out, generator=generator)
    ends = chances[order].cumsum(0)  # the last is `count`, up to rounding
    points = torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(count, dtype=torch.float64)
    places = torch.searchsorted(ends, points.clamp(max=float(ends[-1]) * (1 - 1e-12)))
    rows = torch.unique(order[places])  # sorted
    return RowSample(rows, chances[rows])


def _chances(sizes: Tensor, count: int) -> Tensor:
    """Inclusion probabilities, (out,), that sum to `count`: in proportion to sizes, none above 1."""
    certain = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        share = torch.where(certain, 0.0, sizes)
        chances = (count - int(certain.sum())) * share / share.sum()
        chances[certain] = 1.0
        over = (chances >= 1.0) & ~certain
        if not over.any():
            return chances
        certain |= over
