"""γ, the size of the first step: a search over log γ for the lowest loss on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LOWEST, HIGHEST = 1e-5, 3.0
START = 0.05  # the paper's value at rank 8
STRIDE = 8.0  # factor between the γs that bracket the minimum
WIDTH = 0.5  # of the final bracket, in log γ: the loss is flat around its minimum
MOST_CALLS = 15  # of loss_at; mostly it takes 10
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class GammaSearch:
    """The chosen γ, the loss without any update, and every (γ, loss) that was tried, in order."""

    gamma: float
    base_loss: float
    tried: tuple[tuple[float, float], ...]

    @property
    def loss(self) -> float:
        """The loss at the chosen γ."""
        return dict(self.tried).get(self.gamma, self.base_loss)


def search_gamma(loss_at: Callable[[float], float]) -> GammaSearch:
    """Find the γ in [1e-5, 3] with the lowest loss: bracket by factors of 8, then golden section over log γ.

    loss_at(0) is the base's loss. A loss that is not finite counts as infinite. γ = 0 is returned when nothing
    lowers the loss. At most MOST_CALLS calls of loss_at.
    """
    tried: dict[float, float] = {}

    def loss(gamma: float) -> float:
        if gamma not in tried:
            value = loss_at(gamma)
            tried[gamma] = value if math.isfinite(value) else math.inf
        return tried[gamma]

    base_loss = loss(0.0)
    low, high = _bracket(loss)
    _golden_section(loss, low, high)
    best = min(tried, key=lambda gamma: (tried[gamma], gamma))
    return GammaSearch(best, base_loss, tuple(tried.items()))


def _bracket(loss: Callable[[float], float]) -> tuple[float, float]:
    """Walk from START towards lower loss until it rises; return the γs on both sides of the lowest."""
    best, step = START, STRIDE
    if loss(_clip(START * STRIDE)) >= loss(START):  # equal where both are infinite: lower γs may not be
        step = 1 / STRIDE
    before = START / step
    while True:
        following = _clip(best * step)
        if following == best or loss(following) > loss(best):
            return min(before, following), max(before, following)
        before, best = best, following


def _clip(gamma: float) -> float:
    return min(HIGHEST, max(LOWEST, gamma))


def _golden_section(loss: Callable[[float], float], low: float, high: float) -> None:
    """Narrow the bracket to WIDTH. One of the two inner points is always the one evaluated before."""
    left, right = math.log(low), math.log(high)
    inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    while right - left > WIDTH:
        if loss(math.exp(inner)) <= loss(math.exp(outer)):
            right, outer = outer, inner
            inner = right - GOLDEN * (right - left)
        else:
            left, inner = inner, outer
            outer = left + GOLDEN * (right - left)
