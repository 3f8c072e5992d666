"""What adapters take in vLLM, from shapes alone: the size of a slot, how full each one is, what makes it so large.

vLLM 0.32 makes every slot at its start, for every layer that it wraps, at one rank: A (rank, in) and B (out, rank) of
each slice of a packed layer (lora/layers). So one module of a high rank sets the size of all. With the plugin a slot
has a rank for each layer (GPU), or the ranks of all adapters lie side by side in pools (CPU). Pure; bytes are of one
device that holds the whole model (under tensor parallelism each holds a part of B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gora_serve.adapter.engine_ranks import RANK_BUCKETS
from gora_serve.serving.room import PACKED, rank_bucket

Shape = tuple[int, int]  # (out, in)


@dataclass(frozen=True)
class AdapterShapes:
    """An adapter as shapes: rank and (out, in) of each module. width: bytes of an element in its file."""

    name: str
    ranks: Mapping[str, int]
    shapes: Mapping[str, Shape]
    width: int

    @property
    def largest(self) -> int:
        return max(self.ranks.values())

    def elements(self, rank: int | None = None) -> int:
        """Return the elements of all factors: at their own ranks, or all padded to `rank`."""
        return sum(sum(self.shapes[path]) * (rank or own) for path, own in self.ranks.items())


@dataclass(frozen=True)
class InSlot:
    """One adapter in its slot. fill: the share of the slot that its factors use. forcing: the modules, with their
    ranks, that need more than the next smaller bucket; none where another adapter sets the size.

    file_bytes, padded_bytes: of its tensors as they are, and as `export --form padded` would write them.
    """

    name: str
    largest: int
    modules: int
    bucket: int
    fill: float
    forcing: Mapping[str, int]
    file_bytes: int
    padded_bytes: int


@dataclass(frozen=True)
class SlotPlan:
    """The slots of one server. wrapped: layers that vLLM wraps, each slice of a packed one counted.

    lower: the next smaller bucket, None below the smallest; saved: bytes that it would save, over all slots. fits: how
    many adapters the memory holds beside weights and cache. by_layer: each layer has a rank of its own, not `bucket`.
    """

    bucket: int
    slots: int
    wrapped: int
    slot_bytes: int
    lower: int | None
    saved: int
    fits: int
    adapters: tuple[InSlot, ...]
    by_layer: bool = False

    @property
    def bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def forcing(self) -> dict[str, dict[str, int]]:
        """The modules that set the bucket, by adapter."""
        return {one.name: dict(one.forcing) for one in self.adapters if one.bucket == self.bucket and one.forcing}


@dataclass(frozen=True)
class InPools:
    """One adapter in the pools. bytes: of its rows there; padded_bytes: of them, were it written by `export --form
    padded`; file_bytes: of its tensors as they are.
    """

    name: str
    largest: int
    modules: int
    bytes: int
    padded_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class PoolPlan:
    """The pools of one server. rank: its --max-lora-rank, which sets no size here. slots: its --max-loras. layers:
    those of vLLM with a pool, a packed one counted once. fits: how many adapters of their mean size the memory holds.
    """

    rank: int
    slots: int
    layers: int
    bytes: int
    fits: int
    adapters: tuple[InPools, ...]


def wrapped_layers(
    linears: Mapping[str, Shape], ends: Mapping[str, Shape], targets: Sequence[str] | None
) -> dict[str, Shape]:
    """Return the layers that vLLM wraps: those of `--lora-target-modules` with all slices of packed ones; else all.

    ends: embeddings and head, of classes that list them; only without targets.
    """
    if targets is None:
        return {**linears, **ends}
    named = {*targets, *(slice_ for packed in PACKED.values() if set(packed) & set(targets) for slice_ in packed)}
    return {path: shape for path, shape in linears.items() if path.rpartition(".")[2] in named}


def plan_slots(
    adapters: Sequence[AdapterShapes],
    wrapped: Mapping[str, Shape],
    *,
    slots: int,
    spare: int,
    width: int,
    room: int,
    ranks: Mapping[str, int] | None = None,
) -> SlotPlan:
    """Reckon the slots for these adapters.

    slots: how many the engine makes, with `spare` empty ones. width: bytes of an element in a slot (the served dtype).
    room: bytes for slots. ranks: that of a slot by module, where the plugin sets it; else one for all. Raises
    InputError (GS-387) for a rank above what vLLM serves.
    """
    bucket = rank_bucket(max(adapter.largest for adapter in adapters))
    held = {path: bucket if ranks is None else ranks[path] for path in wrapped}
    elements = sum(held[path] * sum(shape) for path, shape in wrapped.items())
    lower = _lower(bucket)
    above = {path: 0 if lower is None else max(0, rank - lower) for path, rank in held.items()}
    saved = slots * width * sum(above[path] * sum(shape) for path, shape in wrapped.items())
    seen = tuple(_in_slot(adapter, elements) for adapter in adapters)
    size = elements * width
    fits = max(0, room // size - spare) if size else 0
    return SlotPlan(bucket, slots, len(wrapped), size, lower, saved, fits, seen, ranks is not None)


def plan_pools(
    adapters: Sequence[AdapterShapes],
    wrapped: Mapping[str, Shape],
    rows: Mapping[str, int],
    *,
    slots: int,
    layers: int,
    width: int,
    room: int,
) -> PoolPlan:
    """Reckon the pools for these adapters. rows: of each module's slice, as the plugin makes them."""
    total = width * sum(rows[path] * sum(shape) for path, shape in wrapped.items())
    seen = tuple(_in_pools(adapter, wrapped, width) for adapter in adapters)
    fits = room * len(adapters) // total if total else 0
    rank = rank_bucket(max(adapter.largest for adapter in adapters))
    return PoolPlan(rank, slots, layers, total, fits, seen)


def _in_pools(adapter: AdapterShapes, wrapped: Mapping[str, Shape], width: int) -> InPools:
    own = {path: rank for path, rank in adapter.ranks.items() if path in wrapped}
    padded = rank_bucket(adapter.largest)
    sides = {path: sum(wrapped[path]) * width for path in own}
    return InPools(
        adapter.name, adapter.largest, len(adapter.ranks), sum(rank * sides[path] for path, rank in own.items()),
        padded * sum(sides.values()), adapter.elements() * adapter.width,
    )  # fmt: skip


def _in_slot(adapter: AdapterShapes, slot: int) -> InSlot:
    bucket = rank_bucket(adapter.largest)
    lower = _lower(bucket)
    forcing = {} if lower is None else {path: rank for path, rank in adapter.ranks.items() if rank > lower}
    return InSlot(
        adapter.name, adapter.largest, len(adapter.ranks), bucket, adapter.elements() / slot if slot else 0.0,
        dict(sorted(forcing.items(), key=lambda item: (-item[1], item[0]))), adapter.elements() * adapter.width,
        adapter.elements(bucket) * adapter.width,
    )  # fmt: skip


def _lower(bucket: int) -> int | None:
    """Return the next smaller rank that vLLM takes; the smallest, 1, is none that an adapter would be made for."""
    smaller = [one for one in RANK_BUCKETS if 1 < one < bucket]
    return max(smaller, default=None)
