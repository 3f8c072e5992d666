"""The fingerprint of an adapter's answers, as its manifest has it: what follows a few prompts, over its base.

Written by `export`, which asks PEFT; read by `serve`, which asks the engine. Log probabilities are natural ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import InputError

SCHEMA = "gora-serve/canary/1"

Answer = Mapping[int, float]  # token -> log probability


@dataclass(frozen=True)
class Expected:
    """What follows a prompt, by its likeliest tokens: with the adapter, and those same tokens' over the base alone."""

    tokens: tuple[int, ...]
    adapter: Answer
    base: Answer

    def effect(self) -> float:
        """Return the largest change that the adapter makes to a log probability here."""
        return max(abs(value - self.base[token]) for token, value in self.adapter.items())

    def to_json(self) -> dict[str, object]:
        """Return the form of the manifest; log probabilities to 5 decimals, as more would depend on the machine."""
        pairs = [[token, round(value, 5), round(self.base[token], 5)] for token, value in self.adapter.items()]
        return {"tokens": list(self.tokens), "top": pairs}


def fingerprint_json(expected: Sequence[Expected]) -> dict[str, object]:
    """Return a fingerprint as `gora_manifest.json` has it, under "canary"."""
    return {"schema": SCHEMA, "prompts": [one.to_json() for one in expected]}


def read_fingerprint(value: object, file: Path) -> tuple[Expected, ...]:
    """Return the fingerprint that a manifest has; () where it has none. InputError (GS-3354) if it is malformed."""
    if value is None:
        return ()
    try:
        if not isinstance(value, dict) or value["schema"] != SCHEMA:
            raise ValueError("schema")
        return tuple(_read_expected(one) for one in value["prompts"])
    except (LookupError, TypeError, ValueError) as err:
        raise InputError(
            f"the fingerprint in this manifest is malformed: {err!r}", code="GS-3354", file=file, expected=SCHEMA,
            hint="export the adapter again",
        ) from err  # fmt: skip


def _read_expected(value: Mapping[str, object]) -> Expected:
    tokens, top = value["tokens"], value["top"]
    if not isinstance(tokens, list) or not isinstance(top, list) or not top or not tokens:
        raise TypeError("tokens and top")
    if not all(type(token) is int and token >= 0 for token in [*tokens, *(row[0] for row in top)]):
        raise TypeError("a token")
    adapter = {row[0]: float(row[1]) for row in top}
    base = {row[0]: float(row[2]) for row in top}
    if not all(map(math.isfinite, (*adapter.values(), *base.values()))):
        raise ValueError("not finite")
    return Expected(tuple(tokens), adapter, base)
