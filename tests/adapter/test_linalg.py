"""Folding and padding keep the update: checked on delta in numpy, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import as_factors, compress, distance, fold_scale, leading, pad_rank, stack, subtract
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


def other(rank: int, seed: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, 9, generator=generator), torch.randn(7, rank, generator=generator), 0.75)


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 9), initial=st.integers(1, 9), seed=st.integers(0, 1000))
def test_subtract_is_the_difference_of_the_updates(rank: int, initial: int, seed: int) -> None:
    one, two = random_factors(rank, 1.5), other(initial, seed)
    left = subtract(one, two)
    np.testing.assert_allclose(update(left), update(one) - update(two), atol=1e-12)
    np.testing.assert_allclose(distance(one, two), np.linalg.norm(update(one) - update(two)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(update(stack([one, two, two])), update(one) + 2 * update(two), atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(rank=st.integers(1, 12), scale=st.floats(-8, 8).filter(lambda scale: abs(scale) > 1e-3))
def test_compress_at_full_rank_changes_nothing(rank: int, scale: float) -> None:
    factors = random_factors(rank, scale)
    spectrum = compress(factors)
    values = np.linalg.svd(update(factors), compute_uv=False)
    assert spectrum.rank == min(rank, 7)
    np.testing.assert_allclose(spectrum.singular.numpy(), values[: spectrum.rank], rtol=1e-10)
    np.testing.assert_allclose(update(spectrum.first(spectrum.rank)), update(factors), atol=1e-11)
    gram = spectrum.A @ spectrum.A.T
    np.testing.assert_allclose(gram.numpy(), np.diag(spectrum.singular.numpy()), atol=1e-10 * values[0])


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_first_part_is_the_best_of_its_rank(rank: int) -> None:
    factors = random_factors(6, 2.0)
    spectrum = compress(factors)
    U, S, Vh = np.linalg.svd(update(factors), full_matrices=False)
    np.testing.assert_allclose(update(spectrum.first(rank)), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-10)
    np.testing.assert_allclose(spectrum.dropped(rank), np.linalg.norm(S[rank:]), rtol=1e-9)


def test_a_rank_that_is_not_there_is_not_kept() -> None:
    factors = random_factors(2, 1.0)
    twice = stack([factors, factors, other(1, 3), LoraFactors(factors.A, factors.B, -0.5)])
    assert compress(twice).rank == 3
    assert compress(subtract(factors, factors)).rank == 0


def test_tolerance_drops_what_is_below_it_together() -> None:
    A, B = torch.eye(4, 9, dtype=torch.float64), torch.eye(7, 4, dtype=torch.float64)
    factors = LoraFactors(torch.diag(torch.tensor([1.0, 0.1, 0.003, 0.003], dtype=torch.float64)) @ A, B, 1.0)
    assert compress(factors, tolerance=0.004).numerical_rank == 3  # the last two together have 0.0042
    assert compress(factors, tolerance=0.0043).numerical_rank == 2


def test_a_small_difference_of_large_factors_survives_in_float64() -> None:
    """Norms by QR of the stacked factors, where squares would cancel: 1e-9 of the factors' size."""
    factors = random_factors(4, 1.0, torch.float64)
    nudge = other(1, 5)
    moved = stack([factors, LoraFactors(nudge.A, nudge.B, 1e-9)])
    assert distance(moved, factors) == pytest.approx(1e-9 * np.linalg.norm(update(nudge)) / 0.75, rel=1e-5)


@pytest.mark.parametrize("shape", [(64, 90), (90, 64)])
@pytest.mark.parametrize("decay", [0.5, 0.97, 1.0])
def test_the_leading_directions_of_an_update_of_full_rank(shape: tuple[int, int], decay: float) -> None:
    """Less than half of it is computed: near the best where the spectrum falls, and what is said of the rest true."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(size, 64, generator=generator).double()).Q for size in shape)
    values = decay ** torch.arange(64).double()
    M = (left * values) @ right.T
    spectrum = leading(as_factors(M), 8)
    assert (spectrum.rank, spectrum.A.is_contiguous(), spectrum.B.is_contiguous()) == (8, True, True)
    np.testing.assert_allclose(spectrum.singular, values[:8], rtol=0.01 if decay < 1 else 0.2)
    for rank in (1, 5, 8):
        rest = np.linalg.norm(M.numpy() - update(spectrum.first(rank)))
        np.testing.assert_allclose(spectrum.dropped(rank), rest, rtol=1e-6)
    np.testing.assert_allclose(spectrum.rest, spectrum.dropped(8))
