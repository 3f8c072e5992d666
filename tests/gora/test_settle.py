"""When a probe may stop: against plans and shares worked out by hand."""

from __future__ import annotations

import pytest

from gora_serve.config import RankConfig
from gora_serve.gora.settle import has_settled, moved

SHAPES = {"a": (64, 64), "b": (64, 64)}
EVEN = {"a": 1.0, "b": 1.0}


def test_moved_is_the_share_that_changed_its_module() -> None:
    assert moved({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 6.0}) == 0.0
    assert moved({"a": 1.0, "b": 3.0}, {"a": 3.0, "b": 1.0}) == pytest.approx(0.5)
    assert moved({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}) == pytest.approx(1.0)


def test_importances_of_nothing() -> None:
    zero = {"a": 0.0, "b": 0.0}
    assert moved(zero, zero) == 0.0
    assert moved(zero, EVEN) == 1.0


def test_two_quiet_checks_are_needed() -> None:
    assert not has_settled([EVEN], SHAPES, RankConfig())
    assert not has_settled([EVEN, EVEN], SHAPES, RankConfig())
    assert has_settled([EVEN, EVEN, EVEN], SHAPES, RankConfig())
    assert has_settled([{"a": 9.0, "b": 1.0}, EVEN, EVEN, EVEN], SHAPES, RankConfig())


def test_a_move_of_more_than_one_per_cent_goes_on() -> None:
    """Ranks 8 and 8 at both ends, but 2 % of the importance has moved."""
    shifted = {"a": 1.04, "b": 0.96}
    assert moved(EVEN, shifted) == pytest.approx(0.02)
    assert not has_settled([EVEN, EVEN, shifted], SHAPES, RankConfig())


def test_a_rank_that_changes_goes_on() -> None:
    """Raw ranks 8.49 and 8.51: hardly a move, but one rank tips over."""
    below, above = {"a": 8.49, "b": 7.51}, {"a": 8.51, "b": 7.49}
    assert moved(below, above) < 0.01
    assert not has_settled([below, below, above], SHAPES, RankConfig())
    assert has_settled([below, below, below], SHAPES, RankConfig())
