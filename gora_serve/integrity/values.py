"""Whether tensors of different types hold the same values: one's bytes in the other's type, hashed as the other was.

Nothing is stored for it beside the digests that every manifest has, and nothing is read until roots differ.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from gora_serve.integrity.digest import TensorRecord, differences, tensor_digest
from gora_serve.integrity.headers import TensorEntry, read_open_header
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.manifest_schema import Manifest
from gora_serve.integrity.reading import open_regular, read_range

WINDOW = 1 << 18  # bytes at a time; a multiple of the size of every element

Recode = Callable[
    [bytes], bytes | bytearray
]  # of whole elements, little-endian; ValueError where the other type lacks a value


def only_types_differ(folder: Path, expected: Mapping[str, TensorRecord], actual: Manifest) -> bool:
    """Return whether the model in `folder`, of which `actual` was just made, has the tensors of `expected`, value for
    value, with at least one in another type.

    A value of BF16 or F16 equals one of F32 where that has its bits after widening: F32's sign and exponent, the
    fraction filled up with zeros. So minus zero and the bits of NaN count. Between other types nothing is equal. Reads
    the tensors that differ, the smallest first, until one is not equal.
    """
    tied = {name: stored for name, stored in actual.aliases.items() if name in expected}
    tensors = {**actual.tensors, **{name: actual.tensors[stored] for name, stored in tied.items()}}
    found = differences(expected, tensors)
    if found.missing or found.extra or not all(_comparable(tensors[name], expected[name]) for name in found.changed):
        return False
    wanted = {(tied.get(name, name), expected[name]) for name in found.changed}
    return bool(wanted) and _all_equal(folder, sorted(wanted, key=lambda pair: (pair[1].nbytes, pair[0])))


def _comparable(actual: TensorRecord, expected: TensorRecord) -> bool:
    return actual.shape == expected.shape and (actual.dtype, expected.dtype) in _RECODES


def _all_equal(folder: Path, wanted: list[tuple[str, TensorRecord]]) -> bool:
    with ExitStack() as stack:
        places: dict[str, tuple[int, int, Path, TensorEntry]] = {}
        for path in find_model(folder).weights.values():
            fd = stack.enter_context(open_regular(path))
            header = read_open_header(fd, path)
            places |= {name: (fd, header.data_start, path, entry) for name, entry in header.entries.items()}
        return all(name in places and _equal(*places[name], record) for name, record in wanted)


def _equal(fd: int, data_start: int, path: Path, entry: TensorEntry, expected: TensorRecord) -> bool:
    recode = _RECODES[entry.dtype, expected.dtype]

    def recoded() -> Iterator[bytes | bytearray]:
        for begin in range(entry.begin, entry.end, WINDOW):
            end = min(begin + WINDOW, entry.end)
            yield recode(read_range(fd, data_start + begin, data_start + end, path=path))

    try:
        return tensor_digest(recoded()) == expected.digest
    except ValueError:
        return False


def _bf16_to_f32(data: bytes) -> bytearray:
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return wide


def _f32_to_bf16(data: bytes) -> bytearray:
    if data[0::4].strip(b"\0") or data[1::4].strip(b"\0"):
        raise ValueError("a value is not one of BF16")
    narrow = bytearray(len(data) // 2)
    narrow[0::2], narrow[1::2] = data[2::4], data[3::4]
    return narrow


def _f16_to_f32(data: bytes) -> bytes:
    return _bytes(array("I", map(_widened().__getitem__, _numbers("H", data))))


def _f32_to_f16(data: bytes) -> bytes:
    try:
        return _bytes(array("H", map(_narrowed().__getitem__, _numbers("I", data))))
    except KeyError as err:
        raise ValueError("a value is not one of F16") from err


def _numbers(kind: str, data: bytes) -> array[int]:
    numbers = array(kind, data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bytes(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


@cache
def _widened() -> list[int]:
    """Return the bits in F32 of each of the 65536 values of F16 (IEEE 754, binary16 and binary32)."""
    return [_f32_bits(bits >> 15, bits >> 10 & 31, bits & 1023) for bits in range(1 << 16)]


def _f32_bits(sign: int, exponent: int, fraction: int) -> int:
    if exponent == 31:  # infinity and NaN
        exponent = 255
    elif exponent:
        exponent += 127 - 15
    elif fraction:  # below the normal numbers: F32 has them as normal ones
        shift = 11 - fraction.bit_length()
        fraction, exponent = fraction << shift & 1023, 127 - 14 - shift
    return sign << 31 | exponent << 23 | fraction << 13


@cache
def _narrowed() -> dict[int, int]:
    return {wide: bits for bits, wide in enumerate(_widened())}


_RECODES: Mapping[tuple[str, str], Recode] = {
    ("BF16", "F32"): _bf16_to_f32,
    ("F32", "BF16"): _f32_to_bf16,
    ("F16", "F32"): _f16_to_f32,
    ("F32", "F16"): _f32_to_f16,
}
