"""When a probe may stop early: the ranks stand still and the importances hardly move. Plain numbers; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from gora_serve.config import RankConfig
from gora_serve.gora.ranks import Shape, allocate_ranks

CHECKS = 2  # as many checks in a row must find nothing new (the authors' answer to reviewer 4NWP, Q4)
MOVED = 0.01  # the share of the whole importance that may still have moved


def has_settled(checks: Sequence[Mapping[str, float]], shapes: Mapping[str, Shape], config: RankConfig) -> bool:
    """Return whether the last CHECKS checks changed no rank and moved less than MOVED of the importance each.

    checks: the importance of each module at each check so far, in order.
    """
    if len(checks) <= CHECKS:
        return False
    recent = checks[-CHECKS - 1 :]
    pairs = list(pairwise(recent))
    if any(moved(before, after) >= MOVED for before, after in pairs):
        return False
    plans = [allocate_ranks(importances, shapes, config).ranks for importances in recent]
    return all(plan == plans[0] for plan in plans)


def moved(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return Σ |a_i - a'_i| / 2 over the advantages (equation 6), from 0 to 1: the share that changed its module."""
    total_before, total_after = sum(before.values()), sum(after.values())
    if total_before == 0.0 or total_after == 0.0:
        return 0.0 if total_before == total_after else 1.0
    return sum(abs(before[path] / total_before - after[path] / total_after) for path in before) / 2
