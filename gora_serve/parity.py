"""`serve --verify`: what the engine answers against what PEFT answers, by adapter, before the server is ready."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from gora_serve.errors import RunError
from gora_serve.progress import Listener, Progress, silent
from gora_serve.serving.canary import tolerance
from gora_serve.serving.client import complete
from gora_serve.serving.keys import read_keys
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.served_dtype import dtype_served

STEPS = 8  # tokens that continue each prompt
TOP = 5  # log probabilities compared at each of them


@dataclass(frozen=True)
class Compared:
    """The largest difference of a log probability between engine and PEFT, over `count` of them."""

    name: str
    distance: float
    count: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.count} log probabilities within {self.distance:.2g} of PEFT's in {self.dtype}"


def check_parity(plan: ServePlan, *, token: str | None = None, listen: Listener = silent) -> Iterator[Compared]:
    """Compare the base and every adapter of a running server with PEFT in float32; yield each that passes.

    The base is loaded a second time, into host memory. Raises RunError (GS-7353) where a log probability is further off
    than the dtype that is served allows.
    """
    import torch

    from gora_serve.training.reference import Reference, prompts

    reference = Reference(plan.base, {one.name: one.path for one in plan.adapters}, torch.float32)
    texts = prompts(plan.base, after=STEPS)
    key = next(iter(read_keys(os.environ, plan.key_file)), None)
    allowed, dtype = tolerance(plan.dtype, plan.base), dtype_served(plan.dtype, plan.base)
    for index, model in enumerate(plan.models):
        worst, count = 0.0, 0
        for tokens in texts:
            answer = complete(plan.url, model, tokens, STEPS, logprobs=TOP, key=key, token=token)
            served = [next(iter(step)) for step in answer.top]
            name = None if index == 0 else model
            rows = reference.logprobs(name, [*tokens, *served[:-1]], len(served))  # (steps, vocabulary)
            off = [abs(value - float(row[token])) for step, row in zip(answer.top, rows, strict=True)
                   for token, value in step.items()]  # fmt: skip
            worst = max([worst, *(math.inf if math.isnan(one) else one for one in off)])
            count += len(off)
        listen(Progress("verify", index + 1, len(plan.models)))
        if worst > allowed:
            raise RunError(
                f"{model} does not answer as PEFT does", code="GS-7353",
                expected=f"log probabilities within {allowed:g}",
                actual=f"off by {worst:.3g}", hint="--dtype float32 tells rounding from a wrong answer",
            )  # fmt: skip
        yield Compared(model, worst, count, dtype)
