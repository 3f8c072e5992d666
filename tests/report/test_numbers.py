"""Axes, thinning and correlation: laws that hold for any numbers, and pandas as the oracle of ranks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.report.chart import scale_of
from gora_serve.report.numbers import duration, rank_correlation, short, smooth, spread, thin, tick, ticks

NUMBERS = st.floats(-(2.0**53), 2.0**53)
POSITIVE = st.floats(5e-324, 2.0**53)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_any_numbers_have_an_axis(values: list[float]) -> None:
    scale = scale_of(values, 0.0, 300.0)
    assert all(-0.01 <= scale(value) <= 300.01 for value in values)
    found = scale.ticks()
    assert 1 <= len(found) <= 12
    assert found == sorted(found)
    assert len({tick(value) for value in found}) <= len(found)


@settings(deadline=None)
@given(st.lists(POSITIVE, min_size=1, max_size=9))
def test_any_positive_numbers_have_a_logarithmic_axis(values: list[float]) -> None:
    scale = scale_of(values, 0.0, 300.0, log=True)
    assert all(-0.01 <= scale(value) <= 300.01 for value in values)
    assert 1 <= len(scale.ticks()) <= 12


def test_ticks_are_round() -> None:
    assert ticks(0, 6.3) == [0, 2, 4, 6]
    assert ticks(0.12, 0.31) == [0.15, 0.2, 0.25, 0.3]
    assert ticks(3, 3) == [3]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_correlation_of_ranks(pairs: list[tuple[int, int]]) -> None:
    xs, ys = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    found = rank_correlation(xs, ys)
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        assert found is None
    else:
        places = pd.Series(xs).rank(), pd.Series(ys).rank()
        assert found == pytest.approx(float(np.corrcoef(*places)[0, 1]), abs=1e-9)


def test_thinning_keeps_the_mean_and_what_is_not_finite() -> None:
    points = [(float(n), None if n == 500 else float(n % 7)) for n in range(1000)]
    found = thin(points, 100)
    assert 100 <= len(found) <= 101
    assert [x for x, y in found if y is None] == [500.0]
    known = [y for _, y in found if y is not None]
    assert math.fsum(known) / len(known) == pytest.approx(3.0, abs=0.02)
    assert thin(points[:5], 100) == points[:5]


def test_smoothing_is_a_moving_mean() -> None:
    assert smooth([(0, 1.0), (1, 2.0), (2, None), (3, 4.0)], 3) == [(0, 1.5), (1, 1.5), (2, None), (3, 4.0)]


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(2, 40))
def test_spread_has_both_ends(count: int, most: int) -> None:
    found = spread(count, most)
    assert len(found) <= most
    assert found == sorted(set(found))
    assert not count or (found[0], found[-1]) == (0, count - 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (short(0.123456), "0.1235"), (short(6.32), "6.320"), (short(1234567.0), "1.235e+06"), (short(0.0), "0"),
        (short(None), "-"), (short(2e-5), "2.000e-05"), (duration(0.419), "0.42 s"), (duration(12.34), "12.3 s"),
        (duration(158.2), "2 min 38 s"), (duration(7380), "2 h 03 min"), (tick(1.5), "1.5"),
        (tick(100000.0), "100,000"),
    ],
)  # fmt: skip
def test_how_numbers_are_written(text: str, wanted: str) -> None:
    assert text == wanted
