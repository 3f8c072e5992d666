"""Trainable tokens of PEFT: rows of the embeddings, replaced. As LoRA they are exact, with a rank for each token.

Saved beside LoRA (trainable_token_indices) or alone (peft_type TRAINABLE_TOKENS). Where the base ties its head to the
embeddings, PEFT replaces the head's rows too and saves nothing for it; so it does for the halves of an
encoder-decoder that share one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from converters.checks import check_numbers
from converters.reading import Inputs
from converters.source import Source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.names import PREFIX
from gora_serve.deploy.base import HALVES, SHARED, BaseWeights
from gora_serve.errors import InputError

_PART = re.compile(r"(\.token_adapter)?\.trainable_tokens_delta(\.default)?$")


@dataclass(frozen=True)
class Rows:
    """The trained rows (k, d) of one module's weight (V, d): their tensor's name, and the k tokens."""

    tensor: str
    tokens: list[int]


def rows_of(source: Source, inputs: Inputs) -> dict[str, Rows]:
    """Return the trained rows by module path; those of a tied head are the embeddings'.

    Raises InputError (GS-3116) where the configuration's tokens do not fit the rows or the base.
    """
    found = {}
    for name in source.tensors:
        part = _PART.search(name)
        if part and name.startswith(PREFIX):
            found[name[len(PREFIX) : part.start()]] = name
    if not found:
        return {}
    check_numbers(source, found.values())
    base = inputs.need_base("trainable tokens: their update is a difference to the base's rows; its conversion")
    rows = {path: Rows(name, _tokens(source, base, path, name)) for path, name in found.items()}
    for path, one in list(rows.items()):
        stem = path.removesuffix(SHARED) if path.endswith(SHARED) else None
        halves = [f"{stem}{half}" for half in HALVES if stem is not None and base.find(f"{stem}{half}")]
        rows = dict.fromkeys(halves, one) | rows
    embeddings = next((path for path in rows if base.is_read_by_head(path)), None)
    return {base.head: rows[embeddings], **rows} if embeddings else rows


def row_factors(source: Source, base: BaseWeights, path: str, rows: Rows) -> LoraFactors:
    """Return delta (V, d), the trained rows less the base's, as B (V, k) of zeros and ones and A (k, d), in float64."""
    A = source.tensors[rows.tensor].double() - base.weight(path)[rows.tokens].double()
    B = A.new_zeros(base.shape(path)[0], len(rows.tokens))
    B[rows.tokens, torch.arange(len(rows.tokens))] = 1.0
    return LoraFactors(A, B, 1.0)


def _tokens(source: Source, base: BaseWeights, path: str, name: str) -> list[int]:
    given = source.config.get("trainable_token_indices") or source.config.get("token_indices")
    if isinstance(given, Mapping):
        given = next((tokens for module, tokens in given.items() if path.endswith(module)), None)
    tokens = given if isinstance(given, list) else []
    shape, (vocabulary, width) = source.tensors.shape(name), base.shape(path)
    valid = all(type(one) is int and 0 <= one < vocabulary for one in tokens)
    if not (valid and tokens and len(set(tokens)) == len(tokens) and shape == (len(tokens), width)):
        raise InputError(
            "the trained tokens and their rows do not fit", code="GS-3116", file=source.config_file, tensor=name,
            expected=f"trainable_token_indices: {(*shape, 0)[0]} different tokens below {vocabulary}; rows of {width}",
            actual=f"{str(given)[:60]}; rows {shape}", hint="take adapter_config.json from the folder of the same run",
        )  # fmt: skip
    return tokens
