"""What is no finite number to an engine, by numpy's word, for every sign, exponent and first bits of a fraction."""

from __future__ import annotations

import numpy as np
import pytest

from gora_serve.integrity.finite import EXPONENTS, first_not_finite

NARROW = {"F64": 2.0**128}  # and above: beyond float32


@pytest.mark.parametrize(("dtype", "word"), [("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8")])
def test_every_high_half(dtype: str, word: str) -> None:
    size = EXPONENTS[dtype][0]
    bits = np.arange(1 << 16, dtype="<u2")
    for low in (0, 0xFF):
        rows = np.full((len(bits), size), low, np.uint8)
        rows[:, -2:] = bits.view(np.uint8).reshape(-1, 2)
        values = np.frombuffer(rows.tobytes(), word)
        fits = np.isfinite(values) & (np.abs(values) < NARROW.get(dtype, np.inf))
        assert [first_not_finite(row.tobytes(), dtype) is None for row in rows] == fits.tolist()
        first = int(np.argmin(fits))
        assert first_not_finite(rows.tobytes(), dtype) == first
