"""What adapters take in vLLM, from shapes alone: the size of a slot, how full each one is, what makes it so large.

vLLM 0.32 makes every slot at its start, for every layer that it wraps, at one rank: A (rank, in) and B (out, rank) of
each slice of a packed layer (lora/layers). So one module of a high rank sets the size of all. Pure; bytes are of one
device that holds the whole model (under tensor parallelism each holds a part of B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gora_serve.serving.room import PACKED, RANK_BUCKETS, rank_bucket

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
    many adapters the memory holds beside weights and cache; None where nothing is left for any.
    """

    bucket: int
    slots: int
    wrapped: int
    slot_bytes: int
    lower: int | None
    saved: int
    fits: int
    adapters: tuple[InSlot, ...]

    @property
    def bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def forcing(self) -> dict[str, dict[str, int]]:
        """The modules that set the bucket, by adapter."""
        return {one.name: dict(one.forcing) for one in self.adapters if one.bucket == self.bucket and one.forcing}


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
    adapters: Sequence[AdapterShapes], wrapped: Mapping[str, Shape], *, slots: int, spare: int, width: int, room: int
) -> SlotPlan:
    """Reckon the slots for these adapters.

    slots: how many the engine makes, with `spare` empty ones. width: bytes of an element in a slot (the served dtype).
    room: bytes for slots. Raises InputError (GS-387) for a rank above what vLLM serves.
    """
    bucket = rank_bucket(max(adapter.largest for adapter in adapters))
    total = sum(sum(shape) for shape in wrapped.values())  # elements of a slot, for each rank
    size = total * bucket * width
    lower = _lower(bucket)
    saved = 0 if lower is None else slots * total * (bucket - lower) * width
    seen = tuple(_in_slot(adapter, total * bucket) for adapter in adapters)
    fits = max(0, room // size - spare) if size else 0
    return SlotPlan(bucket, slots, len(wrapped), size, lower, saved, fits, seen)


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
