"""From importance to ranks (paper, section 3.2, equations 6 to 8). Plain numbers; no torch.

Two rules: `paper` is equation 8 as printed, `exact` spends LoRA's parameter count as fully as whole ranks allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gora_serve.config import RankConfig
from gora_serve.errors import InputError

Shape = tuple[int, int]


@dataclass(frozen=True)
class RankPlan:
    """A rank for each module. `shapes` are (out, in); a module of rank 0 gets no adapter."""

    rule: str
    rank: int
    rank_min: int
    rank_max: int
    ranks: Mapping[str, int]
    shapes: Mapping[str, Shape]

    @property
    def parameters(self) -> int:
        """Trainable parameters: Σ r_i (in_i + out_i)."""
        return sum(rank * sum(self.shapes[path]) for path, rank in self.ranks.items())

    @property
    def lora_parameters(self) -> int:
        """Parameters of plain LoRA on the same modules at the reference rank."""
        return lora_parameters(self.shapes, self.rank)


def lora_parameters(shapes: Mapping[str, Shape], rank: int) -> int:
    """Return Σ rank (in + out): LoRA with one rank for every module, or min(in, out) where a module has no more."""
    return sum(min(rank, *shape) * sum(shape) for shape in shapes.values())


def uniform_ranks(shapes: Mapping[str, Shape], config: RankConfig) -> RankPlan:
    """Give every module the reference rank: plain LoRA."""
    ranks = {path: min(config.rank, *shape) for path, shape in shapes.items()}
    return RankPlan("uniform", config.rank, config.lowest, config.highest, ranks, dict(shapes))


def allocate_ranks(importances: Mapping[str, float], shapes: Mapping[str, Shape], config: RankConfig) -> RankPlan:
    """Allocate a rank to each module by its importance.

    Rule `paper` (equation 8): r_i = clip(round(budget a_i / √(in_i + out_i)), rank_min, rank_max), with
    a_i = I_i / Σ I (equation 6) and budget = Σ √(in_i + out_i) rank (equation 7). Rounding is to the nearest
    integer, halves to even. Rule `exact` multiplies the raw ranks by one common factor; see `_exact`.

    A rank never exceeds min(in, out), where (A Aᵀ) would have no inverse: our departure for tiny modules.
    Ranks depend on importances only up to a common positive factor. All importances 0 gives every module the
    reference rank, for there is nothing to tell modules apart by. A negative or non-finite importance raises
    InputError.
    """
    config.validate()
    total = _checked_sum(importances, shapes)
    budget = sum(math.sqrt(sum(shape)) * config.rank for shape in shapes.values())
    raw = {
        path: budget * (importances[path] / total) / math.sqrt(sum(shape)) if total > 0 else float(config.rank)
        for path, shape in shapes.items()
    }
    bounds = {path: (min(config.lowest, *shape), min(config.highest, *shape)) for path, shape in shapes.items()}
    if config.rule == "paper":
        ranks = {path: _clip(round(raw[path]), bounds[path]) for path in shapes}
    else:
        ranks = _exact(raw, shapes, bounds, lora_parameters(shapes, config.rank))
    return RankPlan(config.rule, config.rank, config.lowest, config.highest, ranks, dict(shapes))


def _checked_sum(importances: Mapping[str, float], shapes: Mapping[str, Shape]) -> float:
    if set(importances) != set(shapes):
        odd = sorted(set(importances) ^ set(shapes))[0]
        raise InputError(
            "importances and shapes name different modules", code="GS-350", hint="take both from one probe", tensor=odd
        )
    for path, value in importances.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(
                "importance is not a finite number of 0 or more", code="GS-351", tensor=path, actual=value,
                hint="probe again; a loss that is NaN on some row makes every gradient NaN",
            )  # fmt: skip
    try:
        return math.fsum(importances.values())
    except OverflowError as err:
        raise InputError("the sum of the importances overflows", code="GS-351", hint="probe again") from err


def _clip(value: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], value))


def _exact(
    raw: Mapping[str, float],
    shapes: Mapping[str, Shape],
    bounds: Mapping[str, tuple[int, int]],
    allowed: int,
) -> dict[str, int]:
    """Return the clipped, rounded c * raw of the largest c whose total is not above `allowed`, then fill up.

    c is found by bisection. Several modules may round up at the same c, so what is left of `allowed` then goes,
    one rank at a time, to the module that lies furthest below c * raw and still fits. Among modules of one
    shape a larger raw rank never gets fewer ranks. Unless every module sits at its upper bound, less than one
    rank of the cheapest module that could still grow is left over.
    """

    def ranks_at(factor: float) -> dict[str, int]:
        return {path: _clip(round(min(factor * raw[path], 1e15)), bounds[path]) for path in raw}

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(rank * sum(shapes[path]) for path, rank in ranks.items())

    low, high = 0.0, 1.0
    while cost(ranks_at(high)) <= allowed and high < 1e30:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(ranks_at(middle)) <= allowed else (low, middle)
    ranks = ranks_at(low)
    left = allowed - cost(ranks)
    while fitting := [p for p in ranks if ranks[p] < bounds[p][1] and sum(shapes[p]) <= left]:
        path = max(fitting, key=lambda p: (low * raw[p] - ranks[p], raw[p]))
        ranks[path] += 1
        left -= sum(shapes[path])
    return ranks
