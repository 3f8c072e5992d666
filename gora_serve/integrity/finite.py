"""NaN and infinity in a safetensors file, found from its bytes: no torch, no numpy, a mebibyte at a time.

A float64 beyond float32 is infinite too: to engines, which cast factors to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from gora_serve.errors import InputError
from gora_serve.integrity.headers import TensorEntry, read_open_header
from gora_serve.integrity.reading import open_regular, read_range

PIECE = 1 << 20  # bytes, a multiple of every element's size
# Type -> bytes of an element, and which bits of its two highest bytes are all ones in NaN and infinity alone.
EXPONENTS: Mapping[str, tuple[int, int]] = {
    "F16": (2, 0x7C00), "BF16": (2, 0x7F80), "F32": (4, 0x7F80), "F64": (8, 0x7FF0),
}  # fmt: skip


def check_finite(path: Path) -> None:
    """Raise InputError (GS-339), naming tensor and index, for the first value of the file that is NaN or infinite."""
    with open_regular(path) as fd:
        header = read_open_header(fd, path)
        for entry in header.entries.values():
            for begin, piece in _pieces(fd, header.data_start, entry, path):
                place = first_not_finite(piece, entry.dtype)
                if place is not None:
                    raise _refused(path, entry, begin // EXPONENTS[entry.dtype][0] + place)


def _pieces(fd: int, start: int, entry: TensorEntry, path: Path) -> Iterator[tuple[int, bytes]]:
    for begin in range(0, entry.nbytes if entry.dtype in EXPONENTS else 0, PIECE):
        first = start + entry.begin + begin
        yield begin, read_range(fd, first, min(first + PIECE, start + entry.end), path=path)


def first_not_finite(data: bytes, dtype: str) -> int | None:
    """Return the index of the first element of `data`, of a type of EXPONENTS, that is NaN or infinite."""
    size, ones = EXPONENTS[dtype]
    high, low = (data[size - 1 - i :: size] for i in (0, 1))
    both = _where(high, _ones(ones >> 8)) & _where(low, _ones(ones & 0xFF))
    if dtype == "F64":  # of 2^128 and above
        both |= _where(high, _LARGE) | _where(high, _AT_LIMIT) & _where(low, _ones(0xF0))
    return (both & -both).bit_length() // 8 if both else None


def _where(data: bytes, table: bytes) -> int:
    """Return a number of one byte for each of `data`, 1 where the table says so."""
    return int.from_bytes(data.translate(table), "little")


_LARGE, _AT_LIMIT = (bytes(byte & 0x7F in found for byte in range(256)) for found in (range(0x48, 0x80), (0x47,)))


@cache
def _ones(bits: int) -> bytes:
    """The table for `translate` that makes 1 of a byte in which all of `bits` are set, and 0 of any other."""
    return bytes(byte & bits == bits for byte in range(256))


def _refused(path: Path, entry: TensorEntry, flat: int) -> InputError:
    index = []
    for size in reversed(entry.shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return InputError(
        "the adapter holds a value that is NaN or infinite", code="GS-339", file=path, tensor=entry.name,
        expected=f"finite numbers{', below 2^128' if entry.dtype == 'F64' else ''}", actual=f"at index {index[::-1]}",
        hint="take an earlier checkpoint of the run: the training had diverged",
    )  # fmt: skip
