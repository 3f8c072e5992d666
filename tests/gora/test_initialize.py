"""The starting adapter against numpy's least squares, the expected norms of appendix A.2, and a real descent step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gora_serve.errors import InputError
from gora_serve.gora.initialize import draw_A, initialize, rank_stabilized_scale

CASES = [((48, 64), 8), ((64, 48), 5), ((200, 30), 30), ((16, 256), 1), ((300, 300), 32)]  # (out, in), rank
ALPHA = 16.0


def random_gradient(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3e-4


def drawn(shape: tuple[int, int], rank_max: int, seed: int = 1) -> torch.Tensor:
    return draw_A(shape, rank_max, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_b_is_minus_xi_times_the_least_squares_solution(shape: tuple[int, int], rank: int) -> None:
    """numpy minimises |Aᵀ Bᵀ - Gᵀ| column by column (appendix A.1); ξ = γ √in / α."""
    G, A_max, gamma = random_gradient(shape), drawn(shape, 32), 0.3
    compressed = (G.double() @ A_max.double().T).float()
    A, B = initialize(A_max, compressed, rank=rank, gamma=gamma, alpha=ALPHA)
    solution = np.linalg.lstsq(A.double().numpy().T, G.double().numpy().T, rcond=None)[0]  # (r, out)
    expected = -gamma * math.sqrt(shape[1]) / ALPHA * solution.T
    assert A.shape == (rank, shape[1])
    assert B.shape == (shape[0], rank)
    assert A.dtype == B.dtype == torch.float32
    assert np.linalg.norm(B.numpy() - expected) / np.linalg.norm(expected) < 1e-4


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_first_update_has_the_size_gamma_times_g(shape: tuple[int, int], rank: int) -> None:
    """A.2: a projection of random G on r of `in` directions keeps r/in of |G|² on average.

    |PG|² / |G|² is a mean over `out` rows of Beta(r/2, (in-r)/2) variables with variance
    2 r (in - r) / (in² (in + 2)); five standard deviations of it bound the ratio.
    """
    out, inn = shape
    gamma = 0.05
    G, A_max = random_gradient(shape, seed=11), drawn(shape, 32, seed=12)
    A, B = initialize(A_max, G @ A_max.T, rank=rank, gamma=gamma, alpha=ALPHA)
    delta = rank_stabilized_scale(ALPHA, rank) * B.double().numpy() @ A.double().numpy()
    ratio = np.linalg.norm(delta) ** 2 / (gamma * np.linalg.norm(G.double().numpy())) ** 2
    variance = 2 * (inn - rank) / (rank * (inn + 2)) / out
    assert abs(ratio - 1) < 5 * math.sqrt(variance) + 1e-4


def test_a_full_rank_start_is_the_gradient_step_itself() -> None:
    """With r = in the projection is the identity: delta_0 = -γ G."""
    G = random_gradient((40, 12), seed=2)
    A_max = drawn((40, 12), 64)
    A, B = initialize(A_max, (G.double() @ A_max.double().T).float(), rank=12, gamma=0.7, alpha=ALPHA)
    delta = (ALPHA / math.sqrt(12)) * (B.double() @ A.double())
    torch.testing.assert_close(delta, -0.7 * G.double(), rtol=2e-3, atol=1e-7)


def test_a_small_step_goes_downhill() -> None:
    """Quadratic loss |X Wᵀ - Y|² / 2 of a linear layer, its true gradient, a small γ: the loss must fall.

    To first order it falls by <G, -delta>, which is γ √(in/r) |PG|²: positive whatever A is.
    """
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(20, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    X = torch.randn(100, 32, generator=generator, dtype=torch.float64)
    Y = torch.randn(100, 20, generator=generator, dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (X @ weight.T - Y).square().mean() / 2

    loss(W).backward()
    G = W.grad
    assert G is not None
    A_max = drawn((20, 32), 8)
    gamma = 1e-3
    A, B = initialize(A_max, (G @ A_max.double().T).float(), rank=4, gamma=gamma, alpha=ALPHA)
    delta = (ALPHA / math.sqrt(4)) * (B.double() @ A.double())
    with torch.no_grad():
        fall = float(loss(W) - loss(W + delta))
    assert fall > 0
    assert fall == pytest.approx(float(-(G * delta).sum()), rel=1e-2)


def test_b_is_linear_in_gamma() -> None:
    G, A_max = random_gradient((24, 40)), drawn((24, 40), 16)
    compressed = G @ A_max.T
    _, one = initialize(A_max, compressed, rank=6, gamma=1.0, alpha=ALPHA)
    _, half = initialize(A_max, compressed, rank=6, gamma=0.5, alpha=ALPHA)
    _, none = initialize(A_max, compressed, rank=6, gamma=0.0, alpha=ALPHA)
    assert torch.equal(half, one * 0.5)  # a power of two: exact
    assert not none.any()


def test_a_holds_the_first_rows_whatever_the_rank() -> None:
    A_max = drawn((64, 48), 32)
    for rank in (1, 7, 32):
        A, _ = initialize(A_max, torch.zeros(64, 32), rank=rank, gamma=1.0, alpha=ALPHA)
        assert torch.equal(A, A_max[:rank])
        A.zero_()  # a copy: A_max must live on for the other ranks
    assert A_max.abs().sum() > 0


def test_a_is_drawn_as_peft_draws_it() -> None:
    """PEFT fills lora_A by kaiming_uniform_(a=√5). Same stream of random numbers, same values."""
    from torch import nn

    theirs = torch.empty(32, 200)
    nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(9))
    ours = drawn((300, 200), 32, seed=9)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    bound = 1 / math.sqrt(200)
    assert 0.99 * bound < ours.abs().max() <= bound
    assert ours.mean().abs() < 5 * bound / math.sqrt(3 * 32 * 200)
    assert float(ours.var()) == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize(("shape", "rows"), [((64, 48), 32), ((8, 48), 8), ((64, 5), 5), ((1, 64), 1)])
def test_a_max_never_has_dependent_rows(shape: tuple[int, int], rows: int) -> None:
    A = drawn(shape, 32)
    assert A.shape == (rows, shape[1])
    assert torch.linalg.matrix_rank(A.double()) == rows


def test_dependent_rows_are_an_error_not_a_wrong_solution() -> None:
    A_max = drawn((16, 16), 4)
    A_max[1] = A_max[0]
    with pytest.raises(torch.linalg.LinAlgError):
        initialize(A_max, torch.ones(16, 4), rank=2, gamma=1.0, alpha=ALPHA)


def test_the_forward_scale_is_rank_stabilized() -> None:
    assert rank_stabilized_scale(16, 4) == 8.0
    assert rank_stabilized_scale(16, 64) == 2.0


def test_a_rank_above_the_rows_of_a_max_is_an_error() -> None:
    A_max = drawn((16, 16), 4)
    with pytest.raises(InputError, match="GS-395"):
        initialize(A_max, torch.zeros(16, 4), rank=5, gamma=0.1, alpha=16.0)
