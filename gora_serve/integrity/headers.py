"""The header of a safetensors file, read strictly and written deterministically, without the safetensors library.

Whatever `read_header` accepts the library accepts too, with the same names, types and shapes; we refuse more (duplicate
names, control characters, a million tensors). No tensor data is read or held here.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import InputError
from gora_serve.integrity.canonical import (
    StrictJsonError,
    canonical_json,
    is_unicode,
    refuse_constant,
    unique_pairs,
)
from gora_serve.integrity.reading import open_regular, read_range, size_of

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element under safetensors' own spellings (safetensors 0.8)."""

MAX_HEADER = 100_000_000  # bytes, the safetensors library's limit
MAX_TENSORS = 100_000
MAX_NAME = 512  # bytes of UTF-8
MAX_NUMBER = 2**53  # elements, dimensions and offsets: what JSON can carry exactly
METADATA = "__metadata__"
AGAIN = "download or copy the file again"
RENAME = "save the tensors again under other names"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its bytes are [begin, end) counted from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header: `entries` in the order of their data, which starts `data_start` bytes into the file."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def read_header(path: Path) -> Header:
    """Return the header of the safetensors file at `path`; at most header-size bytes are read.

    Raises InputError (GS-301 to GS-317, GS-334) naming the file and the tensor, MachineError (GS-501, GS-502) when the
    file cannot be read.
    """
    with open_regular(path) as fd:
        return read_open_header(fd, path)


def read_open_header(fd: int, path: Path) -> Header:
    """Return the header of the safetensors file that is open at `fd`; `path` is for messages only."""
    size = size_of(fd)
    start = read_range(fd, 0, min(size, 64), path=path)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > MAX_HEADER:
        raise _other_format(start, path)
    if length + 8 > size:
        raise InputError(
            "the file ends inside its header: it was not downloaded whole", code="GS-305", file=path,
            expected=f"at least {length + 8} bytes", actual=f"{size} bytes", hint=AGAIN,
        )  # fmt: skip
    members = _parse(read_range(fd, 8, 8 + length, path=path), path)
    metadata = _metadata(members.pop(METADATA, {}), path)
    entries = _entries(members, path)
    data_size = _check_layout(entries, path)
    _check_size(size, 8 + length + data_size, path)
    return Header({entry.name: entry for entry in entries}, metadata, 8 + length, size)


def _other_format(start: bytes, path: Path) -> InputError:
    """Return the error for a file that starts like no safetensors file: what it is instead, where that is plain."""
    if not start:
        return InputError("this file is empty", code="GS-301", file=path, hint=AGAIN)
    if start.startswith(b"version https://git-lfs"):
        return InputError("this is a Git LFS pointer, not the file", code="GS-303", file=path, hint="run: git lfs pull")
    if start.lstrip()[:1] == b"<":
        return InputError("this is an HTML or XML page, not a safetensors file", code="GS-302", file=path, hint=AGAIN)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"GGUF")):
        hint = "convert the model to safetensors with the tool that wrote it"
        return InputError("this is a pickle, zip or GGUF file, not safetensors", code="GS-302", file=path, hint=hint)
    if len(start) < 8:
        return InputError(
            "this file is too short for safetensors", code="GS-302", file=path,
            expected="at least 8 bytes", actual=f"{len(start)} bytes", hint=AGAIN,
        )  # fmt: skip
    return InputError(
        "this is not a safetensors file, or its header is too long", code="GS-304", file=path,
        expected=f"a header of at most {MAX_HEADER} bytes",
        actual=f"{int.from_bytes(start[:8], 'little')} bytes", hint=AGAIN,
    )  # fmt: skip


def _parse(raw: bytes, path: Path) -> dict[str, object]:
    """Return the header's JSON object; objects are counted as they close, so a flood of tensors stops early."""
    if not raw.startswith(b"{"):
        raise InputError("the header does not start with '{'", code="GS-308", file=path, hint=AGAIN)
    if max(raw.count(b'"'), raw.count(b",")) > 15 * MAX_TENSORS:  # an entry needs ten quotes and about five commas
        raise _too_many(path)
    closed = 0

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal closed
        closed += 1
        if closed > MAX_TENSORS + 2:
            raise _too_many(path)
        return unique_pairs(items)

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=pairs, parse_constant=refuse_constant, parse_float=_refuse_float, parse_int=_natural,
        )  # fmt: skip
    except StrictJsonError as err:
        code = "GS-309" if err.duplicate is not None else "GS-308"
        raise InputError(
            f"the header is refused: {err}", code=code, file=path, tensor=err.duplicate, hint=AGAIN
        ) from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"the header is not JSON: {err}", code="GS-308", file=path, hint=AGAIN) from err
    assert isinstance(value, dict)
    return value


def _too_many(path: Path | None) -> InputError:
    return InputError(
        "the header names too many tensors", code="GS-310", file=path, expected=f"at most {MAX_TENSORS}", hint=AGAIN
    )


def _refuse_float(text: str) -> int:
    raise StrictJsonError(f"{text[:40]} is not a natural number")


def _natural(text: str) -> int:
    # The library reads "-0" as a float, Python as 0; neither a sign nor twenty digits has a use here.
    if text.startswith("-") or len(text) > 16 or int(text) > MAX_NUMBER:
        raise StrictJsonError(f"{text[:40]} is not a natural number up to 2**53")
    return int(text)


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(
            f"{METADATA} does not map strings to strings", code="GS-317", file=path, tensor=METADATA, hint=AGAIN
        )
    if not all(is_unicode(text) for pair in value.items() for text in pair):
        raise InputError(
            f"{METADATA} holds half of a surrogate pair", code="GS-317", file=path, tensor=METADATA, hint=AGAIN
        )
    return value


def _entries(members: Mapping[str, object], path: Path | None) -> list[TensorEntry]:
    if len(members) > MAX_TENSORS:
        raise _too_many(path)
    _check_names(list(members), path)
    entries = [_entry(name, value, path) for name, value in members.items()]
    return sorted(entries, key=lambda entry: (entry.begin, entry.end, entry.name))


def _check_names(names: Sequence[str], path: Path | None) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not is_unicode(name) or len(name.encode("utf-8")) > MAX_NAME or _has_control(name) or name in ("", METADATA):
            expected = f"1 to {MAX_NAME} bytes of UTF-8 without control characters"
            shown = name if len(name) <= MAX_NAME else name[:60] + "..."
            raise InputError(
                "this tensor name is refused", code="GS-315", file=path, tensor=shown, expected=expected, hint=RENAME
            )
        twin = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            raise InputError(
                "two tensor names differ only in case or Unicode form", code="GS-316", file=path,
                tensor=f"{twin!a} and {name!a}", hint=RENAME,
            )  # fmt: skip


def _has_control(name: str) -> bool:
    return not name.isprintable() and any(unicodedata.category(char) == "Cc" for char in name)


def _entry(name: str, value: object, path: Path | None) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        expected = "an object with dtype, shape and data_offsets"
        raise InputError(
            "this tensor's header entry is malformed", code="GS-311", file=path, tensor=name, expected=expected,
            hint=AGAIN,
        )  # fmt: skip
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    nbytes = tensor_nbytes(name, dtype, shape, path=path)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_natural(item) for item in offsets):
        raise InputError("data_offsets is not a pair of naturals", code="GS-311", file=path, tensor=name, hint=AGAIN)
    begin, end = offsets
    if end - begin != nbytes:
        raise InputError(
            "the data of this tensor does not have the size of its shape", code="GS-313", file=path, tensor=name,
            expected=f"{nbytes} bytes for {dtype} {shape}", actual=f"{end - begin} bytes", hint=AGAIN,
        )  # fmt: skip
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def tensor_nbytes(name: str, dtype: object, shape: object, *, path: Path | None = None) -> int:
    """Return the size in bytes of a tensor; InputError (GS-312, GS-313) when type or shape cannot be."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(
            "unknown tensor type", code="GS-312", file=path, tensor=name,
            expected=", ".join(DTYPE_BITS), actual=str(dtype)[:40], hint=AGAIN,
        )  # fmt: skip
    if not isinstance(shape, (list, tuple)) or not all(_is_natural(size) for size in shape):
        raise InputError("the shape is not a list of naturals", code="GS-313", file=path, tensor=name, hint=AGAIN)
    if math.prod(size or 1 for size in shape[:64]) > MAX_NUMBER or len(shape) > 64:
        expected = f"at most 64 dimensions and {MAX_NUMBER} elements"
        raise InputError("the shape is too large", code="GS-313", file=path, tensor=name, expected=expected, hint=AGAIN)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise InputError("the tensor does not end on a whole byte", code="GS-313", file=path, tensor=name, hint=AGAIN)
    return bits // 8


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER


def _check_layout(entries: Sequence[TensorEntry], path: Path) -> int:
    """Return the size of the data section, which the sorted entries must fill without hole or overlap."""
    position = 0
    for entry in entries:
        if entry.begin != position:
            fault = "overlap" if entry.begin < position else "leave a hole"
            raise InputError(
                f"the tensors {fault}", code="GS-314", file=path, tensor=entry.name,
                expected=f"data from byte {position}", actual=f"byte {entry.begin}", hint=AGAIN,
            )  # fmt: skip
        position = entry.end
    return position


def _check_size(size: int, expected: int, path: Path) -> None:
    if size != expected:
        short = size < expected
        raise InputError(
            "the file ends early: it was not downloaded whole" if short else "the file has bytes after its last tensor",
            code="GS-306" if short else "GS-307", file=path,
            expected=f"{expected} bytes", actual=f"{size} bytes", hint=AGAIN,
        )  # fmt: skip


def encode_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and JSON header of a file that holds `tensors` (name, type, shape) in the given order.

    The data follows without gaps. The same arguments give the same bytes; keys are sorted, blanks pad to 8 bytes.
    Readers that map tensors in place want wide types before narrow ones; that order is the caller's. Raises InputError
    (GS-309, GS-312, GS-313, GS-315, GS-316, GS-321) for what `read_header` would refuse.
    """
    names = [name for name, _, _ in tensors]
    if len(set(names)) != len(names):
        raise InputError("two tensors have the same name", code="GS-309", hint="rename one of them")
    _check_names(names, None)
    position = 0
    members: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    for name, dtype, shape in tensors:
        end = position + tensor_nbytes(name, dtype, tuple(shape))
        members[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = canonical_json(members)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
