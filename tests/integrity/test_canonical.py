"""Canonical JSON against RFC 8785's own rules, and the bounded reader against hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.canonical import canonical_json, read_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def test_keys_sort_by_utf16_code_units() -> None:
    # The example of RFC 8785, section 3.2.3: an astral character (surrogates from D83D) sorts before U+FB33.
    keys = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert list(json.loads(canonical_json(keys)).values()) == [2, 4, 6, 7, 1, 5, 3]


def test_escapes() -> None:
    assert canonical_json('\x00\x08\x09\x0a\x0c\x0d\x1f"\\/\x7f€') == (
        b'"\\u0000\\b\\t\\n\\f\\r\\u001f\\"\\\\/\x7f\xe2\x82\xac"'
    )


@given(VALUES)
def test_round_trip_and_order_do_not_matter(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == text


@pytest.mark.parametrize("value", [1.0, 2**53, b"x", {1: 2}, "\ud800", {"\udfff": 1}, [{"a": float("nan")}]])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="GS-321"):
        canonical_json(value)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"a": 1, "a": 1}', "GS-309"),
        (b'[{"x": {"b": 1, "b": 2}}]', "GS-309"),
        (b"[NaN]", "GS-319"),
        (b"[-Infinity]", "GS-319"),
        (b"[1e999]", "GS-319"),
        (b"\xef\xbb\xbf{}", "GS-319"),
        (b'"\xff"', "GS-319"),
        (b'"\\ud800"', "GS-319"),
        (b'{"a": ', "GS-319"),
        (b"", "GS-319"),
        (b"1" * 5000, "GS-319"),
        (b"[" * 65 + b"]" * 65, "GS-320"),
        (b"[" * 200_000, "GS-320"),
        (b" " * 2_000_000, "GS-318"),
    ],
)
def test_reader_refuses(tmp_path: Path, raw: bytes, code: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=code) as caught:
        read_json(path, limit=1 << 20)
    assert caught.value.fields["file"] == path


def test_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, null, "é"], "b": ' + "[" * 60 + "]" * 60 + "}", encoding="utf-8")
    assert read_json(path) == json.loads(path.read_text(encoding="utf-8"))


def test_missing_or_odd_files(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="GS-501"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="GS-334"):
        read_json(tmp_path)
