"""Importance metrics and summed gradients against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.gora.statistics import (
    ExactGradient,
    alone,
    gradient_nuclear,
    sensitivity,
    sensitivity_nuclear,
)

SHAPES = [(7, 5), (5, 7), (1, 9), (9, 1), (16, 16)]


def pair(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_agree_with_numpy(shape: tuple[int, int]) -> None:
    W, G = pair(shape)
    W64, G64 = W.numpy().astype(np.float64), G.numpy().astype(np.float64)
    assert sensitivity(W, G) == pytest.approx(np.abs(W64 * G64).mean(), rel=1e-6)
    assert sensitivity_nuclear(W, G) == pytest.approx(np.linalg.norm(W64 * G64, "nuc"), rel=1e-5)
    assert gradient_nuclear(W, G) == pytest.approx(np.linalg.norm(G64, "nuc"), rel=1e-5)


@pytest.mark.parametrize("metric", [sensitivity, sensitivity_nuclear, gradient_nuclear])
def test_metrics_are_linear_in_the_gradients_size_and_blind_to_its_sign(metric) -> None:  # type: ignore[no-untyped-def]
    W, G = pair((6, 11), seed=3)
    assert metric(W, -4 * G) == pytest.approx(4 * metric(W, G), rel=1e-5)
    assert metric(W, torch.zeros_like(G)) == 0.0


def test_sensitivity_of_bfloat16_weights_is_computed_in_the_gradients_dtype() -> None:
    W, G = pair((32, 48), seed=5)
    stored = W.bfloat16()
    expected = np.abs(stored.double().numpy() * G.double().numpy()).mean()
    assert sensitivity(stored, G) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_exact_gradient_is_the_sum_over_all_tokens(parts: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = ExactGradient((5, 3), torch.zeros(1, 3), torch.device("cpu"))
    expected = np.zeros((5, 3))
    for batch, length in parts:
        dY = torch.randn(batch, length, 5, generator=generator)
        X = torch.randn(batch, length, 3, generator=generator)
        gradient.add(dY, X)
        expected += np.einsum("blo,bli->oi", dY.double().numpy(), X.double().numpy())
    np.testing.assert_allclose(gradient.total.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_exact_gradient_adds_bfloat16_in_float32() -> None:
    """1 + 2^-9 is not a bfloat16, so a sum in that dtype would lose the second term."""
    gradient = ExactGradient((1, 1), torch.zeros(1, 1), torch.device("cpu"))
    for value in (1.0, 2.0**-9):
        gradient.add(torch.tensor([[value]], dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    assert gradient.total.item() == 1 + 2.0**-9


@pytest.mark.parametrize(
    ("dtype", "wide", "bound"),
    [
        (torch.bfloat16, torch.float32, 2.0**-8),
        (torch.float16, torch.float16, 1e-6),
        (torch.float32, torch.float32, 1e-6),
    ],
)
def test_a_product_is_as_near_as_its_dtype_allows(dtype: torch.dtype, wide: torch.dtype, bound: float) -> None:
    """Many tokens, small gradients: the sum over tokens is in float32 whatever the result is rounded to.

    In bfloat16 X is wider, as under autocast; float16, in which small gradients vanish, is widened.
    """
    generator = torch.Generator().manual_seed(1)
    dY = (1e-5 * torch.randn(2000, 6, generator=generator)).to(dtype)
    X = torch.randn(2000, 4, generator=generator).to(wide)
    seen = X.to(dtype)
    gradient = ExactGradient((6, 4), torch.zeros(1, 4), torch.device("cpu"))
    gradient.add(dY, X)
    expected = dY.double().numpy().T @ seen.double().numpy()
    assert np.linalg.norm(gradient.total.numpy() - expected) < bound * np.linalg.norm(expected)


def test_finish_takes_the_mean_and_compresses_it() -> None:
    W, total = pair((6, 10), seed=7)
    A = torch.randn(4, 10, generator=torch.Generator().manual_seed(8))
    G = total.double().numpy() / 5
    gradient = ExactGradient((6, 10), A, torch.device("cpu"))
    gradient.total += total
    module = gradient.finish(W, ("sensitivity", "gradient-nuclear"), count=5)
    assert torch.equal(gradient.total, total)
    early = gradient.importance(W, "sensitivity", count=5, reduce=alone)
    assert early == pytest.approx(module.importance["sensitivity"], rel=1e-6)
    assert module.shape == (6, 10)
    assert module.importance["sensitivity"] == pytest.approx(np.abs(W.double().numpy() * G).mean(), rel=1e-6)
    assert module.importance["gradient-nuclear"] == pytest.approx(np.linalg.norm(G, "nuc"), rel=1e-5)
    assert set(module.importance) == {"sensitivity", "gradient-nuclear"}
    assert module.gradient_norm == pytest.approx(np.linalg.norm(G), rel=1e-6)
    np.testing.assert_allclose(module.compressed.numpy(), G @ A.double().numpy().T, rtol=1e-4, atol=1e-9)
    assert torch.equal(module.A, A)
