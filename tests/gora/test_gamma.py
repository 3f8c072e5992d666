"""The search for γ on functions whose minimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.gora.gamma import WIDTH, GammaSearch, search_gamma

BASE_LOSS = 2.0
MOST_CALLS = 15


class Counted:
    """A loss of γ that notes every call."""

    def __init__(self, loss: Callable[[float], float]) -> None:
        self.loss = loss
        self.calls: list[float] = []

    def __call__(self, gamma: float) -> float:
        self.calls.append(gamma)
        return self.loss(gamma)


def search(loss: Callable[[float], float]) -> tuple[GammaSearch, Counted]:
    counted = Counted(loss)
    found = search_gamma(counted)
    assert len(set(counted.calls)) == len(counted.calls), "a gamma was evaluated twice"
    assert len(counted.calls) <= MOST_CALLS
    assert [gamma for gamma, _ in found.tried] == counted.calls
    assert all(gamma == 0 or 0.99e-5 <= gamma <= 3.01 for gamma in counted.calls)
    return found, counted


def valley(minimum: float, sharpness: float = 0.1) -> Callable[[float], float]:
    """Unimodal in log γ with its lowest point at `minimum`, above the base's loss far away from it."""

    def loss(gamma: float) -> float:
        if gamma == 0:
            return BASE_LOSS
        return BASE_LOSS - 1 + sharpness * math.log(gamma / minimum) ** 2

    return loss


@settings(deadline=None, max_examples=150)
@given(log_minimum=st.floats(math.log(1.2e-5), math.log(2.9)))
def test_finds_any_minimum_to_within_the_width(log_minimum: float) -> None:
    found, _ = search(valley(math.exp(log_minimum)))
    assert abs(math.log(found.gamma) - log_minimum) <= WIDTH
    assert found.loss == valley(math.exp(log_minimum))(found.gamma)
    assert found.base_loss == BASE_LOSS


@settings(deadline=None, max_examples=50)
@given(log_minimum=st.floats(math.log(1e-4), math.log(2.0)), steep=st.floats(1.5, 30))
def test_finds_the_minimum_of_a_lopsided_function(log_minimum: float, steep: float) -> None:
    """As real losses are: a gentle fall, then a steep rise."""

    def loss(gamma: float) -> float:
        if gamma == 0:
            return BASE_LOSS
        x = math.log(gamma) - log_minimum
        return 1.0 + (abs(x) * steep if x > 0 else -x * 0.1)

    found, _ = search(loss)
    assert abs(math.log(found.gamma) - log_minimum) <= WIDTH


def test_a_quadratic_in_gamma_itself() -> None:
    """The loss along a gradient step: L(γ) = L0 - g γ + h γ²/2, lowest at g/h."""
    found, _ = search(lambda gamma: 2.0 - 0.5 * gamma + 1.25 * gamma**2)
    assert abs(math.log(found.gamma / 0.2)) <= WIDTH


def test_the_lower_end() -> None:
    found, _ = search(lambda gamma: 2.0 if gamma == 0 else 1.0 + gamma)
    assert found.gamma == pytest.approx(1e-5, rel=WIDTH)


def test_the_upper_end() -> None:
    found, _ = search(lambda gamma: 2.0 - gamma)
    assert found.gamma == pytest.approx(3.0, rel=WIDTH)


@pytest.mark.parametrize("above", [0.0, 1e-3, math.inf, math.nan])
def test_gamma_is_0_where_nothing_lowers_the_loss(above: float) -> None:
    found, _ = search(lambda gamma: BASE_LOSS if gamma == 0 else BASE_LOSS + above)
    assert found.gamma == 0.0
    assert found.loss == BASE_LOSS


def test_gamma_is_0_on_the_way_up() -> None:
    found, _ = search(lambda gamma: BASE_LOSS + gamma)
    assert found.gamma == 0.0


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_loss_that_explodes_is_walked_away_from(broken: float) -> None:
    """Everything above γ = 0.03 breaks down; the best below it is 0.01."""
    found, _ = search(lambda gamma: broken if gamma > 0.03 else valley(0.01)(gamma))
    assert found.gamma == pytest.approx(0.01, rel=WIDTH)


def test_a_base_loss_that_is_not_finite_is_reported_as_infinite() -> None:
    found, _ = search(lambda gamma: math.nan)
    assert found.base_loss == math.inf
    assert found.gamma == 0.0
