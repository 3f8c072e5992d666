"""Numbers on the command line: what --json prints of those that are not finite, and which weights are taken."""

from __future__ import annotations

import json

import click
import pytest

from gora_serve.cli.options import Weighted
from gora_serve.cli.render import Summary, emit


def test_json_has_null_for_numbers_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (float("-inf"), True, None, "x", 2)}}
    emit(Summary(value), as_json=True)
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == {"a": None, "b": [1.5, None], "c": {"d": [None, True, None, "x", 2]}}


@pytest.mark.parametrize("text", ["a:1_0", "a:\uff11", "a:\u0661"])
def test_a_weight_is_written_in_plain_digits(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Weighted().convert(text, None, None)


def test_a_path_that_is_too_long_has_its_weight() -> None:
    assert Weighted().convert("x" * 300 + ":0.5", None, None) == ("x" * 300, 0.5)


def test_an_adapter_needs_a_name() -> None:
    with pytest.raises(click.BadParameter):
        Weighted().convert("", None, None)
