"""Truncation over all modules: budget, tolerance, and that the largest values win."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.adapter.truncate import ranks_of_budget, ranks_of_tolerance

values = st.lists(st.floats(1e-6, 1e6), min_size=0, max_size=8).map(lambda found: sorted(found, reverse=True))
adapters = st.dictionaries(st.sampled_from("abcdef"), values, min_size=1)


def rest(singular: dict[str, list[float]], ranks: dict[str, int]) -> list[float]:
    return [value for path, found in singular.items() for value in found[ranks[path] :]]


@given(singular=adapters, rank=st.integers(1, 9), data=st.data())
def test_a_budget_is_kept_and_used(singular: dict[str, list[float]], rank: int, data: st.DataObject) -> None:
    shapes = {path: data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))) for path in singular}
    ranks = ranks_of_budget(singular, shapes, rank)
    spent = sum(sum(shapes[path]) * ranks[path] for path in ranks)
    budget = sum(sum(shape) for shape in shapes.values()) * rank
    assert spent <= budget
    for path, found in singular.items():
        assert ranks[path] == len(found) or spent + sum(shapes[path]) > budget, "room was left for another value"


@given(singular=adapters, rank=st.integers(1, 9))
def test_with_equal_shapes_the_largest_values_are_kept(singular: dict[str, list[float]], rank: int) -> None:
    ranks = ranks_of_budget(singular, dict.fromkeys(singular, (3, 4)), rank)
    kept = [value for path, found in singular.items() for value in found[: ranks[path]]]
    assert min(kept, default=math.inf) >= max(rest(singular, ranks), default=0)
    assert len(kept) == min(sum(map(len, singular.values())), rank * len(singular))


@given(singular=adapters, tolerance=st.floats(0, 0.999))
def test_a_tolerance_is_kept_and_used(singular: dict[str, list[float]], tolerance: float) -> None:
    ranks = ranks_of_tolerance(singular, tolerance)
    whole = math.fsum(value**2 for found in singular.values() for value in found)
    dropped = math.fsum(value**2 for value in rest(singular, ranks))
    assert dropped <= tolerance**2 * whole * (1 + 1e-12)
    kept = [found[ranks[path] - 1] for path, found in singular.items() if ranks[path]]
    if kept:
        assert dropped + min(kept) ** 2 > tolerance**2 * whole * (1 - 1e-12)
    assert min(kept, default=math.inf) >= max(rest(singular, ranks), default=0)


def test_one_large_value_takes_the_budget_of_many_small_ones() -> None:
    singular = {"a": [9.0, 8.0, 7.0], "b": [1.0, 0.5, 0.2]}
    assert ranks_of_budget(singular, {"a": (2, 2), "b": (2, 2)}, 1) == {"a": 2, "b": 0}
    assert ranks_of_budget(singular, {"a": (2, 2), "b": (2, 2)}, 2) == {"a": 3, "b": 1}
    assert ranks_of_budget({"a": [3.0, 2.0], "b": [1.0]}, {"a": (9, 9), "b": (1, 1)}, 1) == {"a": 1, "b": 1}


def test_zero_tolerance_keeps_all_and_values_without_sense_are_refused() -> None:
    assert ranks_of_tolerance({"a": [2.0, 1.0], "b": []}, 0.0) == {"a": 2, "b": 0}
    with pytest.raises(ValueError, match="must be at least"):
        ranks_of_tolerance({"a": [1.0]}, 1.0)
    with pytest.raises(ValueError, match="must be at least"):
        ranks_of_budget({"a": [1.0]}, {"a": (1, 1)}, 0)
