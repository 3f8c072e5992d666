"""What --json prints of words that cannot be read and of numbers that are not finite; which weights are taken."""

from __future__ import annotations

import json

import click
import pytest
from shell import gora_here

from gora_serve.cli.options import Weighted
from gora_serve.cli.render import Summary, emit


def test_json_has_null_for_numbers_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (float("-inf"), True, None, "x", 2)}}
    emit(Summary(value), as_json=True)
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told == {"a": None, "b": [1.5, None], "c": {"d": [None, True, None, "x", 2]}}


@pytest.mark.parametrize(
    ("words", "what", "command"),
    [
        (("fit", "base", "--json"), "Missing option '--data'", "gora-serve fit"),
        (("serve", "base", "--json", "--port", "x", "--", "--more"), "'x' is not a valid", "gora-serve serve"),
        (("fitt", "--json"), "No such command 'fitt'", "gora-serve"),
    ],
)
def test_words_that_cannot_be_read_are_json_too(words: tuple[str, ...], what: str, command: str) -> None:
    answer = gora_here(*words)
    told = json.loads(answer.out)
    assert (answer.code, told["exit_code"], told["error"]["code"]) == (2, 2, "GS-200")
    assert what in told["error"]["what"]
    assert told["error"]["try"].startswith(f"{command} --help ")
    assert f"Usage: {command} " in answer.err


def test_words_behind_the_dashes_are_the_engines() -> None:
    answer = gora_here("serve", "base", "--port", "x", "--", "--json")
    assert (answer.code, answer.out) == (2, "")


@pytest.mark.parametrize("text", ["a:1_0", "a:\uff11", "a:\u0661"])
def test_a_weight_is_written_in_plain_digits(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Weighted().convert(text, None, None)


def test_a_path_that_is_too_long_has_its_weight() -> None:
    assert Weighted().convert("x" * 300 + ":0.5", None, None) == ("x" * 300, 0.5)


def test_an_adapter_needs_a_name() -> None:
    with pytest.raises(click.BadParameter):
        Weighted().convert("", None, None)
