"""Sketched gradients against the whole matrix, and sampling against what survey theory promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gora_serve.gora.sketch import PILOT_ROWS, RowSample, SketchedGradient, draw_rows

CPU = torch.device("cpu")
OUT, IN, K = 400, 96, 16


def uneven(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, in), G (out, in), A (k, in): rows and columns of G differ by orders of magnitude, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(OUT, 1, generator=generator).exp()
    columns = torch.randn(1, IN, generator=generator).exp()
    G = torch.randn(OUT, IN, generator=generator) * rows * columns * 1e-3
    W = torch.randn(OUT, IN, generator=generator) * 0.1 * torch.rand(OUT, 1, generator=generator)
    return W, G, torch.rand(K, IN, generator=generator) * 2 - 1


def sketch_of(G: Tensor, A: Tensor, sample: RowSample, parts: int = 4) -> SketchedGradient:
    """Feed G as Σ dYᵀ X in parts: dY the unit vectors of some rows, X those rows of G."""
    gradient = SketchedGradient((G.shape[0], G.shape[1]), A, sample, CPU)
    for rows in torch.arange(G.shape[0]).chunk(parts):
        gradient.add(torch.eye(G.shape[0])[rows], G[rows])
    return gradient


def everything(out: int = OUT) -> RowSample:
    return draw_rows(torch.ones(out), out, torch.Generator().manual_seed(0))


def test_sketch_and_rows_are_those_of_the_gradient() -> None:
    W, G, A = uneven()
    sample = draw_rows(torch.ones(OUT), 50, torch.Generator().manual_seed(1))
    gradient = sketch_of(G, A, sample)
    np.testing.assert_allclose(gradient.S, G.double().numpy() @ A.double().numpy().T, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient.R, G[sample.rows], rtol=1e-6)
    half = gradient.finish(W, ("sensitivity",), count=2)
    torch.testing.assert_close(half.compressed, gradient.S / 2)
    assert half.rows == 50


def test_all_rows_give_the_exact_importance_and_norm() -> None:
    W, G, A = uneven()
    statistics = sketch_of(G, A, everything()).finish(W, ("sensitivity",), count=1)
    assert statistics.importance["sensitivity"] == pytest.approx(float((W * G).double().abs().mean()), rel=1e-5)
    assert statistics.importance_error == 0.0
    assert statistics.gradient_norm == pytest.approx(float(G.double().norm()), rel=1e-5)


def test_the_estimate_is_unbiased_and_its_error_is_the_one_stated() -> None:
    """Over 300 samples: mean within 3 standard errors of the truth; the stated error is the observed one."""
    W, G, A = uneven()
    truth = float((W * G).double().abs().mean())
    pilot = sketch_of(G, A, draw_rows(torch.ones(OUT), 48, torch.Generator().manual_seed(2)))
    found, stated = [], []
    for seed in range(300):
        sample = pilot.choose_rows(W, error=0.03, generator=torch.Generator().manual_seed(seed))
        statistics = sketch_of(G, A, sample, parts=1).finish(W, ("sensitivity",), count=1)
        found.append(statistics.importance["sensitivity"] / truth - 1)
        stated.append(statistics.importance_error)
    spread = float(np.std(found))
    assert abs(np.mean(found)) < 3 * spread / 300**0.5 + 0.002  # a ratio estimator's bias is of order 1 / rows
    assert 0.7 < np.mean(stated) / spread < 1.4
    assert spread < 0.03


@pytest.mark.parametrize("error", [0.1, 0.03, 0.01])
def test_rows_are_as_many_as_the_error_needs(error: float) -> None:
    W, G, A = uneven()
    pilot = sketch_of(G, A, draw_rows(torch.ones(OUT), 48, torch.Generator().manual_seed(2)))
    sample = pilot.choose_rows(W, error=error, generator=torch.Generator().manual_seed(0))
    statistics = sketch_of(G, A, sample).finish(W, ("sensitivity",), count=1)
    assert statistics.importance_error < error
    assert len(sample.rows) < OUT or error < 0.03
    assert len(sample.rows) in (*range(32, OUT, 32), OUT), "kernels for too many sizes"


def test_rows_by_size_beat_rows_at_random() -> None:
    W, G, A = uneven()
    truth = float((W * G).double().abs().mean())
    pilot = sketch_of(G, A, draw_rows(torch.ones(OUT), 48, torch.Generator().manual_seed(2)))
    by_size, at_random = [], []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        chosen = pilot.choose_rows(W, error=0.04, generator=generator)
        plain = draw_rows(torch.ones(OUT), len(chosen.rows), generator)
        for sample, errors in ((chosen, by_size), (plain, at_random)):
            value = sketch_of(G, A, sample, parts=1).finish(W, ("sensitivity",), count=1).importance["sensitivity"]
            errors.append((value / truth - 1) ** 2)
    assert np.mean(by_size) < np.mean(at_random)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.floats(0, 1e6), min_size=1, max_size=60), count=st.integers(1, 80), seed=st.integers(0, 2**31))
def test_drawn_rows_are_distinct_and_chances_sum_to_the_count(sizes: list[float], count: int, seed: int) -> None:
    sample = draw_rows(torch.tensor(sizes), count, torch.Generator().manual_seed(seed))
    rows = sample.rows.tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, len(sizes))
    assert all(0 <= row < len(sizes) for row in rows)
    assert bool(((sample.chances > 0) & (sample.chances <= 1)).all())


def test_each_row_is_drawn_as_often_as_its_chance() -> None:
    sizes = torch.tensor([50.0, 1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 2.0])
    counts, chances = torch.zeros(8), torch.zeros(8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        sample = draw_rows(sizes, 3, generator)
        counts[sample.rows] += 1
        chances[sample.rows] = sample.chances
    assert chances.sum() == pytest.approx(3.0)
    np.testing.assert_allclose(counts / 4000, chances, atol=0.03)
    assert chances[0] == 1.0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_a_pilot_that_is_not_finite_draws_rows_evenly(value: float) -> None:
    """What follows is refused by the ranks, which name the module; it must get that far."""
    W, G, A = uneven()
    G[7] = value
    pilot = sketch_of(G, A, everything())
    sample = pilot.choose_rows(W, error=0.01, generator=torch.Generator().manual_seed(0))
    assert len(sample.rows) == PILOT_ROWS
    assert sample.chances.unique().numel() == 1


def test_a_gradient_of_zeros() -> None:
    W, G, A = uneven()
    pilot = sketch_of(G * 0, A, draw_rows(torch.ones(OUT), 48, torch.Generator().manual_seed(2)))
    sample = pilot.choose_rows(W, error=0.01, generator=torch.Generator().manual_seed(0))
    statistics = sketch_of(G * 0, A, sample).finish(W, ("sensitivity",), count=1)
    assert statistics.importance["sensitivity"] == 0.0
    assert statistics.gradient_norm == 0.0
