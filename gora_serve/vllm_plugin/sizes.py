"""How many ranks each layer's buffers hold, from what `serve` declared and vLLM's own limits. No vLLM here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache

from gora_serve.serving.plugin import RANKS, Declared, load_declared
from gora_serve.serving.room import PACKED, rank_bucket

WARM_UP = 8  # rank of the adapters that vLLM warms up with: every slot must hold it


@cache
def declared() -> Declared | None:
    """Return what this process's environment declares, None where it is silent."""
    return declared_in(os.environ)


def declared_in(environ: Mapping[str, str]) -> Declared | None:
    text = environ.get(RANKS)
    return load_declared(text) if text else None


def parts_of(name: str, slices: int) -> tuple[str, ...]:
    """Return the modules, as adapters name them, of a layer's slices."""
    above, _, leaf = name.rpartition(".")
    packed = tuple(f"{above}.{part}" if above else part for part in PACKED.get(leaf, ()))
    return packed if len(packed) == slices else (name,) * slices


def layer_of(module: str) -> tuple[str, int]:
    """Return the layer that a projection is a slice of, as vLLM names it, and how many slices that has."""
    above, dot, leaf = module.rpartition(".")
    for packed, parts in PACKED.items():
        if leaf in parts:
            return f"{above}{dot}{packed}", len(parts)
    return module, 1


def pool_rows(known: Declared | None, module: str, slots: int, max_rank: int) -> int:
    """Return the rows that a projection has in its layer's pool."""
    name, slices = layer_of(module)
    return pool_room(known, name, slices, slots, max_rank)[parts_of(name, slices).index(module)]


def pool_room(known: Declared | None, name: str, slices: int, slots: int, max_rank: int) -> tuple[int, ...]:
    """Return the rows of each slice of a pool: the sum of the ranks of all adapters, and the headroom of later ones."""
    if known is None or not name:
        return (slots * max_rank,) * slices
    later = known.headroom * later_slots(known, slots)
    return tuple(known.modules.get(part, (0, 0))[1] + later for part in parts_of(name, slices))


def slot_rank(known: Declared | None, name: str, slices: int, max_rank: int) -> int:
    """Return the rank of a layer's stacked buffers: the largest of its slices and of its adapters, at vLLM's steps."""
    if known is None or not name:
        return max_rank
    largest = max(known.modules.get(part, (0, 0))[0] for part in parts_of(name, slices))
    return min(max_rank, rank_bucket(max(largest, known.headroom, WARM_UP)))


def later_slots(known: Declared, slots: int) -> int:
    return max(slots - known.adapters, 0)


def headroom_for(known: Declared | None, missing: int, slots: int) -> int:
    """Return the headroom with which an adapter fits that now lacks `missing` rows in a pool."""
    if known is None:
        return missing
    return known.headroom + math.ceil(missing / max(later_slots(known, slots), 1))
