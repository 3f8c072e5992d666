"""What is counted of a merge, against plain Python over the bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.deploy.tally import Tally, count_differing

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def as_bytes(values: torch.Tensor) -> bytes:
    return bytes(values.view(torch.uint8).tolist()) if values.numel() else b""


@given(st.data(), st.sampled_from(DTYPES))
def test_elements_that_differ_are_counted_by_their_bits(data: st.DataObject, dtype: torch.dtype) -> None:
    special = (0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-8)
    pairs = data.draw(st.lists(st.tuples(*[st.sampled_from(special)] * 2), max_size=300))
    one, other = (torch.tensor([pair[side] for pair in pairs], dtype=dtype) for side in (0, 1))
    size = one.itemsize
    left, right = as_bytes(one), as_bytes(other)
    expected = sum(left[i : i + size] != right[i : i + size] for i in range(0, len(left), size))
    assert count_differing(one, other) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_part_of_a_tensor_is_counted_alone(dtype: torch.dtype) -> None:
    whole, changed = torch.zeros(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
    changed[::3] = 1
    assert count_differing(whole[100:200], changed[100:200]) == sum(i % 3 == 0 for i in range(100, 200))


def test_two_halves_make_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(5000, generator=generator).bfloat16()
    exact = before.float() + torch.randn(5000, generator=generator) * 1e-3
    stored = exact.bfloat16()
    whole, halves = Tally(), Tally()
    whole.see(before.float(), exact.clone(), stored, before)
    for part in (slice(0, 1234), slice(1234, 5000)):
        one = Tally()
        one.see(before[part].float(), exact[part].clone(), stored[part], before[part])
        halves.add(one)
    assert (whole.elements, whole.changed, whole.max_error) == (halves.elements, halves.changed, halves.max_error)
    assert whole.changed == sum(a != b for a, b in zip(before.tolist(), stored.tolist(), strict=True))
    assert whole.squared_update == pytest.approx(halves.squared_update, rel=1e-5)
    assert whole.held == pytest.approx(halves.held, rel=1e-4)
