"""The last check before a server is called ready: does each adapter answer as itself?

The engine may take an adapter and leave it without effect, or scale it wrongly, without a word. So each adapter is
asked for the next token of a few prompts. Its answer must not be the base's; and where the adapter's manifest has a
fingerprint, the log probabilities that PEFT computed in float64, it must be those, as near as the served dtype allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import RunError
from gora_serve.integrity.fingerprint import Answer, Expected
from gora_serve.serving.served_dtype import dtype_served

ASKED = 20  # tokens whose log probabilities the engine is asked for: its default limit
SAME = 1e-6  # log probabilities nearer than this are the same answer
# dtype that is served -> the largest difference of a log probability to the fingerprint's. float32 on CPU differs by
# 1e-4 at most (tests/e2e); TF32, other kernels and half precision by more.
TOLERANCES: Mapping[str, float] = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.25}
WIDEST = max(TOLERANCES.values())
# Any tokens show whether an adapter does anything; these exist in every vocabulary of 256 or more.
PROMPTS = ((17, 45, 96, 130, 52, 201, 88, 19), (64, 33, 71, 12, 250, 9, 180, 41), (111, 7, 58, 222, 140, 36, 99, 5))

Ask = Callable[[str, Sequence[int]], Answer]  # (model, tokens of the prompt) -> the next token's


class NotItselfError(RunError):
    """The engine answers, and not as the adapter would: asking again changes nothing."""


@dataclass(frozen=True)
class Checked:
    """What the canary found of one adapter. `distance`: the largest difference to its fingerprint, None without one."""

    name: str
    differs: bool
    distance: float | None

    def __str__(self) -> str:
        if self.distance is None:
            return f"{self.name}: its answers differ from the base's (it has no fingerprint to compare with)"
        told = "" if self.differs else ", too little in this dtype to be told from the base"
        return f"{self.name}: its answers are those of its fingerprint within {self.distance:.2g}{told}"


def tolerance(dtype: str, base: Path) -> float:
    """Return what log probabilities may differ by where `--dtype` is this one."""
    return TOLERANCES.get(dtype_served(dtype, base), WIDEST)


def check_canary(name: str, base: str, expected: Sequence[Expected], allowed: float, ask: Ask) -> Checked:
    """Ask an adapter and the base the same, and compare.

    Raises NotItselfError: GS-7350 where the adapter changes nothing, GS-7351 where it does not answer as its
    fingerprint says, GS-7352 where an answer is not finite.
    """
    prompts = [one.tokens for one in expected] or list(PROMPTS)
    answers = [(_finite(ask(name, prompt), name), _finite(ask(base, prompt), base)) for prompt in prompts]
    differs = any(_distance(ours, theirs) > SAME for ours, theirs in answers)
    if not differs and (not expected or max(one.effect() for one in expected) > allowed):
        raise NotItselfError(
            f"{name} answers exactly as the base: the engine took the adapter and does not use it", code="GS-7350",
            expected="another answer than the base's", actual=f"the same on {len(prompts)} prompts",
            hint="its modules are none that this engine adapts, or it is an adapter as it was before training",
        )  # fmt: skip
    if not expected:
        return Checked(name, differs, None)
    distance = max(_distance(one.adapter, ours) for one, (ours, _) in zip(expected, answers, strict=True))
    if distance > allowed:
        raise NotItselfError(
            f"{name} does not answer as it did when it was exported", code="GS-7351",
            expected=f"log probabilities within {allowed:g}", actual=f"off by {distance:.3g}",
            hint="another engine, quantization or dtype? --dtype float32 narrows it down, --verify compares with PEFT",
        )  # fmt: skip
    return Checked(name, differs, distance)


def _distance(expected: Answer, actual: Answer) -> float:
    """Return the largest difference over the tokens of `expected`; of one that is missing it is without bound."""
    return max(abs(value - actual.get(token, -math.inf)) for token, value in expected.items())


def _finite(answer: Answer, name: str) -> Answer:
    if not answer or not all(map(math.isfinite, answer.values())):
        raise NotItselfError(
            f"{name} answers with numbers that are not finite", code="GS-7352", actual=str(dict(answer))[:200],
            hint="--dtype float32, or bfloat16 where the base overflows in float16",
        )  # fmt: skip
    return answer
