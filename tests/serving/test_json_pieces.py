"""The name of a model out of a request that comes in pieces; Python's own parser says what is right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.serving.json_pieces import TopLevelString, UsageTail

KEYS = st.sampled_from(["model", "mod\\el", "prompt", 'a"model', "usage", ""]) | st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["model", '"', "\\", ":,{}[]"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def found(text: bytes, size: int) -> str | None:
    scan = TopLevelString("model")
    for start in range(0, len(text), size):
        scan.feed(text[start : start + size])
    return scan.value


@given(st.dictionaries(KEYS, VALUES, max_size=6), st.integers(1, 9), st.booleans())
def test_it_is_what_the_parser_finds(value: dict[str, Any], size: int, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    expected = value.get("model")
    got = found(text, size)
    if not isinstance(expected, str):
        assert got is None
    elif ascii_only or expected.isascii():
        assert got == expected


def test_of_two_the_last_counts_and_nested_ones_do_not() -> None:
    assert found(b'{"model": "a", "model" :"b"}', 3) == "b"
    assert found(b'{"x": {"model": "a"}, "tools": [{"model": "c"}]}', 3) is None
    assert found(b'{"mod\\u0065l": "a"}', 2) == "a"
    assert found(b'data: {"model": "a", "choices": [', 4) == "a"


@given(st.binary(max_size=60), st.integers(1, 7))
def test_no_text_is_an_error(text: bytes, size: int) -> None:
    found(text, size)


def test_nothing_long_is_kept() -> None:
    scan = TopLevelString("model")
    scan.feed(b'{"prompt": "')
    for _ in range(1000):
        scan.feed(b"x\\n" * 1000)
    assert len(scan._text) <= 600
    scan.feed(b'", "model": "a"}')
    assert scan.value == "a"
    assert found(b'{"model": "' + b"x" * 300 + b'"}', 50) is None


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}', (7, 3)),
        (b'{"usage":{"input_tokens":7,"input_tokens_details":{"x":1},"output_tokens":3}}', (7, 3)),
        (b'{"usage": {"prompt_tokens": 7, "total_tokens": 7}}', (7, 0)),
        (b'data: {"usage":null}\n\ndata: {"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [D]\n\n', (7, 3)),
        (json.dumps({"text": '"usage":{"prompt_tokens":7,"completion_tokens":3}'}).encode(), None),
        (b'{"usage":null}', None), (b"", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_usage(text: bytes, tokens: tuple[int, int] | None, size: int) -> None:
    tail = UsageTail()
    for start in range(0, len(text), size):
        tail.feed(text[start : start + size])
    assert tail.tokens() == tokens


def test_usage_at_the_end_of_a_long_answer() -> None:
    tail = UsageTail()
    for _ in range(100):
        tail.feed(b"x" * 10_000)
    tail.feed(b'","usage":{"prompt_tokens":1,"completion_tokens":2}}')
    assert tail.tokens() == (1, 2)
    assert len(tail._tail) <= 4096
