"""The forward pass that the tests of other tools' formats rest on is transformers' own, in both conventions."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain_llama import PlainLlama
from proving import EXACT, input_ids, logits_of, off_by
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("neighbors", [False, True])
def test_logits_are_those_of_transformers(tiny_base: Path, neighbors: bool) -> None:
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(tiny_base))
    plain = PlainLlama(tiny_base, neighbors=neighbors)
    assert off_by(plain.logits(input_ids()).float(), theirs) < EXACT
    plain.neighbors = not neighbors  # the weights of the one convention do not serve the other
    assert off_by(plain.logits(input_ids()).float(), theirs) > 1000 * EXACT
