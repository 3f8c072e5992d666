"""Faults 1 to 22: safetensors files that lie, as a base (`hash`) and as an adapter (`serve`)."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from catalogue.conftest import WEIGHTS, Place, entry, pack
from gora_serve.integrity.headers import MAX_HEADER, read_header

ONE = entry()
TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'

# number -> the file's bytes, the code, the tensor that is named, what else the message says
FILES: dict[str, tuple[bytes, str, str | None, tuple[str, ...]]] = {
    "1 empty": (b"", "GS-301", None, ("empty", "download or copy the file again")),
    "2 below 8 bytes": (b"\x02\0\0", "GS-302", None, ("3 bytes",)),
    "3 header of 2**63": (pack({}, length=2**63), "GS-304", None, (str(2**63),)),
    "4 header of 101 MB": (pack({}, length=101_000_000), "GS-304", None, (str(MAX_HEADER), "101000000")),
    "5 ends in header": (pack({"a": ONE})[:-5], "GS-305", None, ("at least", "actual:", "download or copy")),
    "6 a byte short": (pack({"a": ONE}, b"abc"), "GS-306", None, ("expected:", "actual:", "download or copy")),
    "7 trailing bytes": (pack({"a": ONE}, b"abcdPK"), "GS-307", None, ("expected:", "actual:")),
    "8 overlap": (pack({"a": ONE, "b": entry(offsets=(2, 6))}, b"abcdef"), "GS-314", "b", ("overlap",)),
    "9 hole": (pack({"a": ONE, "b": entry(offsets=(8, 12))}, b"a" * 12), "GS-314", "b", ("hole",)),
    "10 negative dimension": (pack({"a": entry(shape=(-1,))}, b"abcd"), "GS-308", None, ("-1",)),
    "10 dimension above 2**53": (pack({"a": entry(shape=(2**53 + 1,))}, b"abcd"), "GS-308", None, ("2**53",)),
    "11 shape overflows": (pack({"a": entry(shape=(2**33, 2**33))}, b"abcd"), "GS-313", "a", ("too large",)),
    "12 none of huge": (pack({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}), "GS-313", "a", ("too large",)),
    "13 duplicate tensor": (pack(TWICE, b"abcd"), "GS-309", "a", ()),
    "14 duplicate metadata": (pack(b'{"__metadata__":{"x":"1","x":"2"}}'), "GS-309", "x", ()),
    "15 not an object": (pack(b" {}"), "GS-308", None, ("does not start with '{'",)),
    "16 not UTF-8": (pack(b'{"\xff":1}'), "GS-308", None, ("utf-8",)),
    "17 unknown type": (pack({"a": entry("F7")}, b"abcd"), "GS-312", "a", ("F7", "BF16")),
    "19 ESC in a name": (pack({"a\x1b[31m": ONE}, b"abcd"), "GS-315", r"a\x1b[31m", ()),
    "19 newline in a name": (pack({"a\n  try: rm": ONE}, b"abcd"), "GS-315", r"a\n  try: rm", ()),
    "19 NUL in a name": (pack({"a\0": ONE}, b"abcd"), "GS-315", r"a\x00", ()),
    "20 names equal but for case": (
        pack({"a.W": ONE, "a.w": entry(offsets=(4, 8))}, b"a" * 8), "GS-316", "'a.W' and 'a.w'", ()),
    "20 names equal after NFC": (
        pack({"\u00e9": ONE, "e\u0301": entry(offsets=(4, 8))}, b"a" * 8), "GS-316", r"'\xe9' and 'e\u0301'", ()),
    "21 tensor called __metadata__": (pack({"__metadata__": ONE}, b"abcd"), "GS-317", "__metadata__", ()),
    "22 an HTML page": (b"<!DOCTYPE html><html>404</html>", "GS-302", None, ("HTML",)),
    "22 an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "GS-303", None, ("git lfs pull",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILES)
def test_file(place: Place, fault: str) -> None:
    raw, gs, tensor, mentions = FILES[fault]
    file, adapter = place.model(raw), place.adapter(raw)
    named = {} if tensor is None else {"tensor": tensor}
    for words, where in (
        (("hash", file.parent), file),
        (place.serve(adapter), adapter / WEIGHTS),
    ):
        answer = place.refuses(words, 3, gs, *mentions)
        assert str(where) in answer.err
        assert "\x1b" not in answer.err
        if where is file:
            assert {name: answer.field(name) for name in named} == named
        elif tensor:
            assert tensor in answer.err


def test_a_million_tensors(place: Place) -> None:
    """18: refused in less than a second of this process's time, and in less than 200 MB."""
    text = b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000))
    file = place.model(pack(b"{" + text + b"}"))
    begun = time.process_time()
    place.refuses(("hash", file.parent), 3, "GS-310", "at most 100000", file=file)
    assert time.process_time() - begun < 1
    peak = memory_of(file)
    assert peak < 200e6, peak


def test_nothing_is_allocated_beyond_the_header(place: Place) -> None:
    """A file that claims a header or a tensor of any size costs no memory."""
    claims = {
        "length": pack({}, length=MAX_HEADER),
        "shape": pack({"a": entry(shape=(2**40,), offsets=(0, 2**42))}),
    }
    files = {name: place.model(raw, name) for name, raw in claims.items()}
    for name, file in files.items():
        place.refuses(("hash", file.parent), 3, "GS-305" if name == "length" else "GS-306", file=file)
        assert memory_of(file) < 1e6


def memory_of(file: Path) -> int:
    """The most that reading the header took, in bytes."""
    from gora_serve.errors import InputError

    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            read_header(file)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
