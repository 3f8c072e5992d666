"""Folding and padding keep the update: checked on delta in numpy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import fold_scale, pad_rank
from gora_serve.errors import InputError


def random_factors(rank: int, scale: float, dtype: torch.dtype = torch.float32) -> LoraFactors:
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, 9, generator=generator), torch.randn(7, rank, generator=generator)
    return LoraFactors(A.to(dtype), B.to(dtype), scale)


def update(factors: LoraFactors) -> np.ndarray:
    """scale * B @ A, without the code under test."""
    B, A = factors.B.double().numpy(), factors.A.double().numpy()
    return np.asarray(factors.scale * np.einsum("or,ri->oi", B, A))


@settings(deadline=None)
@given(rank=st.integers(1, 6), scale=st.floats(-64, 64))
def test_folding_keeps_the_update(rank: int, scale: float) -> None:
    factors = random_factors(rank, scale)
    folded = fold_scale(factors)
    assert folded.scale == 1.0
    assert torch.equal(folded.A, factors.A)
    np.testing.assert_allclose(update(folded), update(factors), rtol=1e-5, atol=1e-6 * (1 + abs(scale)))
    np.testing.assert_allclose(factors.delta().numpy(), update(factors), rtol=1e-12, atol=1e-12 * (1 + abs(scale)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_rounds_once_to_the_nearest(dtype: torch.dtype) -> None:
    factors = random_factors(4, 16 / 3**0.5, dtype)
    expected = torch.from_numpy(factors.B.double().numpy() * factors.scale).to(dtype)
    folded = fold_scale(factors)
    assert folded.B.dtype == dtype
    assert torch.equal(folded.B, expected)


@settings(deadline=None)
@given(rank=st.integers(1, 6), extra=st.integers(0, 10), scale=st.floats(0.1, 8))
def test_padding_keeps_the_update_exactly(rank: int, extra: int, scale: float) -> None:
    factors = random_factors(rank, scale)
    padded = pad_rank(factors, rank + extra)
    assert padded.rank == rank + extra
    assert padded.A.dtype == factors.A.dtype
    np.testing.assert_allclose(update(padded), update(factors), rtol=1e-14, atol=1e-14)
    assert not padded.A[rank:].any()
    assert not padded.B[:, rank:].any()


def test_padding_down_is_our_own_slip() -> None:
    with pytest.raises(ValueError, match="cannot pad rank 4 down to 3"):
        pad_rank(random_factors(4, 1.0), 3)


@pytest.mark.parametrize(
    ("A", "B"),
    [((2, 5), (7, 3)), ((0, 5), (7, 0)), ((5,), (7, 5)), ((2, 5), (7, 2, 1)), ((5, 2), (7, 2))],
)
def test_factors_that_do_not_fit_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="GS-352"):
        LoraFactors(torch.zeros(A), torch.zeros(B), 1.0)


def test_sizes() -> None:
    factors = random_factors(3, 1.0)
    assert (factors.rank, factors.shape, factors.parameters) == (3, (7, 9), 3 * 16)
