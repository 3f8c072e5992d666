"""The cross entropy in chunks against torch's own, in float64 and in the logits' own type."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gora_serve.training import cross_entropy as module
from gora_serve.training.cross_entropy import cross_entropy

LABELS = {
    "every row": [3, 0, 99, 41, 7, 7, 12],
    "some rows": [-100, 0, -100, -100, 99, 12, -100],
    "one row": [-100, -100, -100, 5, -100, -100, -100],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Three rows at a time, so that seven rows make two full chunks and a part of one."""
    monkeypatch.setattr(module, "CHUNK", 350)


def make_logits(dtype: torch.dtype) -> Tensor:
    values = torch.randn(7, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5
    return values.to(dtype).requires_grad_()


def value_and_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_value_and_gradient_are_those_of_float64(labels: list[int], dtype: torch.dtype, tolerance: float) -> None:
    logits, target = make_logits(dtype), torch.tensor(labels)
    exact = logits.detach().double().requires_grad_()
    expected, slope = value_and_gradient(functional.cross_entropy(exact, target), exact)
    loss, gradient = value_and_gradient(cross_entropy(logits, target), logits)
    assert loss.dtype == gradient.dtype == dtype
    assert float((loss - expected) / expected) == pytest.approx(0.0, abs=tolerance)
    assert float((gradient - slope).norm() / slope.norm()) < tolerance
    assert not gradient[target == -100].any()


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_bfloat16_is_float32_rounded_once(labels: list[int]) -> None:
    logits, target = make_logits(torch.bfloat16), torch.tensor(labels)
    wide = logits.detach().float().requires_grad_()
    expected, slope = value_and_gradient(functional.cross_entropy(wide, target), wide)
    loss, gradient = value_and_gradient(cross_entropy(logits, target), logits)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    # half a unit in the last of the 8 binary digits; float32 itself may lie on the other side of a half
    torch.testing.assert_close(gradient.float(), slope, rtol=2.0**-8 * 1.001, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_multiplies_by_the_incoming_gradient(dtype: torch.dtype) -> None:
    """As with gradient accumulation: the loss is divided before backward."""
    target = torch.tensor(LABELS["some rows"])
    one, quarter = make_logits(dtype), make_logits(dtype)
    cross_entropy(one, target).backward()  # type: ignore[no-untyped-call]
    (cross_entropy(quarter, target) / 4).backward()
    assert one.grad is not None
    assert quarter.grad is not None
    assert torch.equal(quarter.grad * 4, one.grad)


def test_a_second_backward_is_an_error_not_a_wrong_gradient() -> None:
    logits = make_logits(torch.float32)
    loss = cross_entropy(logits, torch.tensor(LABELS["every row"])) * 3
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_without_gradients_the_value_is_the_same(labels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = make_logits(torch.bfloat16), torch.tensor(labels)
    expected = cross_entropy(logits, target)
    monkeypatch.delattr(module, "_CrossEntropy")  # not even asked for
    with torch.inference_mode():
        assert torch.equal(cross_entropy(logits, target), expected.detach())
    assert torch.equal(cross_entropy(logits.detach(), target), expected.detach())


def test_no_row_with_loss_is_nan_and_moves_nothing() -> None:
    logits = make_logits(torch.float32)
    loss, gradient = value_and_gradient(cross_entropy(logits, torch.full((7,), -100)), logits)
    assert loss.isnan()
    assert not (gradient.nan_to_num() != 0).any()


def test_logits_that_do_not_lie_together() -> None:
    """Some models cut a padded vocabulary off."""
    wide = make_logits(torch.float32)
    target = torch.tensor([3, 0, 60, 41, 7, 7, 12])
    expected, slope = value_and_gradient(functional.cross_entropy(wide[:, :80], target), wide)
    loss, gradient = value_and_gradient(cross_entropy(wide[:, :80], target), wide)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_give_what_torch_gives(value: float) -> None:
    logits = make_logits(torch.float32)
    with torch.no_grad():
        logits[1, 5] = value
    target = torch.tensor(LABELS["every row"])
    expected, slope = value_and_gradient(functional.cross_entropy(logits, target), logits)
    loss, gradient = value_and_gradient(cross_entropy(logits, target), logits)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(gradient, slope, equal_nan=True)


def test_float16_leaves_a_loss_scaler_something_to_scale() -> None:
    """Over many tokens an unscaled gradient is mostly below what float16 holds. Sums over tokens tell of a bias."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 4000, generator=generator).half().requires_grad_()
    target = torch.randint(4000, (512,), generator=generator)
    scale = 2.0**16
    _, gradient = value_and_gradient(cross_entropy(logits, target) * scale, logits)
    exact = logits.detach().double().requires_grad_()
    _, expected = value_and_gradient(functional.cross_entropy(exact, target) * scale, exact)
    assert float((gradient.double() - expected).norm() / expected.norm()) < 1e-3
    columns = gradient.double().sum(0) - expected.sum(0)
    assert float(columns.norm() / expected.sum(0).norm()) < 1e-3
