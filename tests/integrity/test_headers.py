"""The header reader against the safetensors library and against files that lie."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.headers import DTYPE_BITS, METADATA, encode_header, read_header

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


TWIN = b'"a":{"dtype":"%s","shape":[1],"data_offsets":[0,4]}'


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def library_view(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, "np") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def our_view(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (item.dtype, item.shape) for name, item in read_header(path).entries.items()}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 7), "é😀": torch.ones(3, dtype=torch.bool), "f8": torch.ones(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert our_view(path) == library_view(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    assert {name: item.nbytes for name, item in header.entries.items()} == {
        name: tensor.nbytes for name, tensor in tensors.items()
    }
    found = header.entries["a"]
    raw = path.read_bytes()[header.data_start + found.begin : header.data_start + found.end]
    assert raw == tensors["a"].view(torch.uint8).numpy().tobytes()


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "GS-301"),
    "short": (b"1234567", "GS-302"),
    "html": (b"<!DOCTYPE html><html></html>", "GS-302"),
    "pickle": (b"PK\x03\x04" + b"\7" * 30, "GS-302"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "GS-303"),
    "length 2**63": (pack({}, length=2**63), "GS-304"),
    "length 101 MB": (pack({}, length=101_000_000), "GS-304"),
    "ends in header": (pack({"a": ONE})[:-5], "GS-305"),
    "truncated": (pack({"a": ONE}, b"abc"), "GS-306"),
    "trailing": (pack({"a": ONE}, b"abcde"), "GS-307"),
    "overlap": (pack({"a": ONE, "b": entry(offsets=(2, 6))}, b"abcdef"), "GS-314"),
    "same bytes twice": (pack({"a": ONE, "b": ONE}, b"abcd"), "GS-314"),
    "hole": (pack({"a": ONE, "b": entry(offsets=(8, 12))}, b"a" * 12), "GS-314"),
    "hole at start": (pack({"a": entry(offsets=(4, 8))}, b"a" * 8), "GS-314"),
    "negative dimension": (pack({"a": entry(shape=(-1,))}, b"abcd"), "GS-308"),
    "minus zero": (pack(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "GS-308"),
    "float": (pack(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', b"abcd"), "GS-308"),
    "large dimension": (pack({"a": entry(shape=(2**53 + 1,))}, b"abcd"), "GS-308"),
    "shape overflow": (pack({"a": entry(shape=(2**32, 2**32))}, b"abcd"), "GS-313"),
    "zero of huge": (pack({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}), "GS-313"),
    "wrong size": (pack({"a": entry(shape=(2,))}, b"abcd"), "GS-313"),
    "half a byte": (pack({"a": entry("F4", (3,), (0, 1))}, b"a"), "GS-313"),
    "backwards": (pack({"a": entry(offsets=(4, 0))}, b"abcd"), "GS-313"),
    "boolean": (pack(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"abcd"), "GS-313"),
    "duplicate name": (
        pack(b"{%s,%s}" % (TWIN % b"F32", TWIN % b"I32"), b"abcd"),
        "GS-309",
    ),
    "duplicate metadata": (pack(b'{"__metadata__":{"a":"1","a":"2"}}'), "GS-309"),
    "leading blank": (pack(b" {}"), "GS-308"),
    "list": (pack(b"[]"), "GS-308"),
    "no header": (pack(b""), "GS-308"),
    "UTF-8": (pack(b'{"\xff":1}'), "GS-308"),
    "NaN": (pack(b'{"a":NaN}'), "GS-308"),
    "deep": (pack(b'{"a":' + b"[" * 100_000), "GS-308"),
    "unknown type": (pack({"a": entry("F7")}, b"abcd"), "GS-312"),
    "extra key": (pack({"a": {**ONE, "x": 1}}, b"abcd"), "GS-311"),
    "three offsets": (pack({"a": entry(offsets=(0, 4, 4))}, b"abcd"), "GS-311"),
    "not an object": (pack({"a": [1]}), "GS-311"),
    "control": (pack({"a\x1b[31m": ONE}, b"abcd"), "GS-315"),
    "long name": (pack({"a" * 513: ONE}, b"abcd"), "GS-315"),
    "half surrogate": (pack(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"abcd"), "GS-315"),
    "case": (pack({"a.W": ONE, "a.w": entry(offsets=(4, 8))}, b"a" * 8), "GS-316"),
    "NFC": (pack({"\u00e9": ONE, "e\u0301": entry(offsets=(4, 8))}, b"a" * 8), "GS-316"),
    "metadata tensor": (pack({METADATA: ONE}, b"abcd"), "GS-317"),
    "metadata null": (pack({METADATA: None}), "GS-317"),
    "metadata surrogate": (pack(b'{"__metadata__":{"a":"\\udc00"}}'), "GS-317"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    raw, code = FAULTS[fault]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=code) as caught:
        read_header(path)
    assert caught.value.fields["file"] == path
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("text", [b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', b'"t%d":[]', b'"t%d":{}'])
def test_a_million_tensors_are_refused_cheaply(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(b"{" + b",".join(text % i for i in range(1_000_000)) + b"}"))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="GS-310"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


def test_missing_file_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="GS-501"):
        read_header(tmp_path / "none")


NAMES = st.text(max_size=4) | st.sampled_from(["a", "A", "", METADATA, "a\x00", "é", "x" * 513])
DIMENSIONS = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**53, 2**63, 2**64, 1.0, True, None])
DTYPES = st.sampled_from([*DTYPE_BITS, "F7", "f32"])


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file that is nearly right: a consistent layout with random faults put into header and data."""
    position, members = 0, []
    for name in draw(st.lists(NAMES, max_size=4)):
        dtype, shape = draw(DTYPES), draw(st.lists(DIMENSIONS, max_size=3))
        bits = DTYPE_BITS.get(dtype, 32)
        for size in shape:
            bits *= size if isinstance(size, int) and 0 <= size < 100 else 1
        end = position + bits // 8 + draw(st.sampled_from([0] * 12 + [-1, 1]))
        members.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}))
        position = end
    metadata = draw(st.none() | st.dictionaries(NAMES, NAMES | st.integers(), max_size=2))
    parts = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in draw(st.permutations(members))]
    if metadata is not None:
        parts.append(f'"{METADATA}":{json.dumps(metadata)}')
    raw = ("{" + ",".join(parts) + "}" + draw(st.sampled_from(["", " ", "\n", "\0", "}"]))).encode()
    data = b"\0" * max(0, position + draw(st.sampled_from([0] * 12 + [-1, 1])))
    return pack(raw, data, length=len(raw) + draw(st.sampled_from([0] * 12 + [-1, 1, 2**40])))


def accepted_by_us_is_accepted_by_the_library(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        ours = our_view(path)
    except InputError:
        return
    assert ours == library_view(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(raw=headers())
def test_never_accepts_what_the_library_rejects(tmp_path: Path, raw: bytes) -> None:
    accepted_by_us_is_accepted_by_the_library(tmp_path / "x.safetensors", raw)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_one_damaged_byte(tmp_path: Path, position: int, value: int) -> None:
    raw = bytearray(encode_header([("a.weight", "F32", (2, 3)), ("b", "BF16", (4,)), ("c", "U8", ())], {"k": "v"}))
    raw += bytes(33)
    raw[position % len(raw)] = value
    accepted_by_us_is_accepted_by_the_library(tmp_path / "x.safetensors", bytes(raw))


LAYOUTS = st.lists(
    st.tuples(
        st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits >= 8]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(layout=LAYOUTS, metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3))
def test_encoded_headers_are_read_by_both(
    tmp_path: Path, layout: list[tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = [(f"t.{i}.é", dtype, shape) for i, (dtype, shape) in enumerate(layout)]
    raw = encode_header(tensors, metadata)
    assert raw == encode_header(tensors, dict(reversed(metadata.items())))
    assert len(raw) % 8 == 0
    sizes = [torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8 for _, dtype, shape in tensors]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw + bytes(sum(sizes)))
    expected = {name: (dtype, tuple(shape)) for name, dtype, shape in tensors}
    assert our_view(path) == library_view(path) == expected
    assert read_header(path).metadata == metadata


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "GS-309"),
        ([("a", "F7", (1,))], "GS-312"),
        ([("a", "F32", (-1,))], "GS-313"),
        ([(METADATA, "F32", (1,))], "GS-315"),
        ([("a", "F32", (1,)), ("A", "F32", (1,))], "GS-316"),
    ],
)
def test_encode_refuses_what_read_would(tensors: list[tuple[str, str, tuple[int, ...]]], code: str) -> None:
    with pytest.raises(InputError, match=code):
        encode_header(tensors, {})
