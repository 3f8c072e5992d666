"""From a base and adapter folders to the slots that they take in vLLM: headers and configuration alone are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gora_serve.config import ServeConfig
from gora_serve.errors import UsageError
from gora_serve.integrity.headers import DTYPE_BITS
from gora_serve.serving.adapter_dir import read_adapter_dir
from gora_serve.serving.fits import ADAPTED_EMBEDDINGS, place_of
from gora_serve.serving.plan import architecture, read_served_adapters
from gora_serve.serving.room import slots, target_modules
from gora_serve.serving.slots import AdapterShapes, SlotPlan, plan_slots, wrapped_layers
from gora_serve.training.shapes import DTYPE_BYTES, BaseShapes, read_shapes

CACHE = ServeConfig.kv_cache_gib * 2**30  # bytes that serving keeps for the KV cache at least


@dataclass(frozen=True)
class Capacity:
    """The slots, and what lies beside them: bytes of weights and of the KV cache. notes: what to know of them."""

    plan: SlotPlan
    weights: int
    cache: int
    notes: tuple[str, ...]


def capacity(
    base: Path, named: Sequence[tuple[str, Path]], *, device: Literal["gpu", "cpu"], dtype: str, memory: int
) -> Capacity:
    """Reckon the slots of a server with these adapters, and how many adapters of their ranks `memory` bytes hold.

    Adapters that `serve` would refuse by their headers are refused here too, all faults at once. dtype: of weights and
    slots; "auto" is as the base is stored. Raises what the readers of bases and adapters raise.
    """
    served = read_served_adapters(named)
    if len({name for name, _ in named}) < len(named):
        raise UsageError("two adapters have the same name", code="GS-2472", hint="name them: -a NAME=DIR")
    shapes, kind = read_shapes(base), architecture(base)
    found = [_adapter(name, path) for name, path in named]
    targets = target_modules(served, kind)
    wrapped = wrapped_layers(shapes.linears, _ends(shapes, kind), targets)
    width = DTYPE_BYTES.get(dtype, shapes.dtype_bytes)
    weights = shapes.parameters * width
    where: Literal["cpu", "cuda"] = "cpu" if device == "cpu" else "cuda"
    number, spare = slots(len(served), where, live=False), slots(0, where, live=False)
    room = max(0, memory - weights - CACHE)
    plan = plan_slots(found, wrapped, slots=number, spare=spare, width=width, room=room)
    return Capacity(plan, weights, CACHE, tuple(_notes(found, shapes, targets, spare, number * plan.slot_bytes > room)))


def _adapter(name: str, path: Path) -> AdapterShapes:
    read = read_adapter_dir(name, path)
    pairs = {module: (pair.A, pair.B) for module, pair in read.pairs.items() if pair.A and pair.B}
    ranks = {module: A.shape[0] for module, (A, _) in pairs.items()}
    shapes = {module: (B.shape[0], A.shape[1]) for module, (A, B) in pairs.items()}
    width = max((DTYPE_BITS[A.dtype] // 8 for A, _ in pairs.values()), default=4)
    return AdapterShapes(name, ranks, shapes, width)


def _ends(shapes: BaseShapes, kind: str | None) -> dict[str, tuple[int, int]]:
    """Return embeddings and head, which vLLM wraps for some classes even where no adapter has them."""
    if kind not in ADAPTED_EMBEDDINGS:
        return {}
    hidden, vocabulary = shapes.settings.hidden, shapes.settings.vocabulary
    return {"embed_tokens": (hidden, vocabulary), "lm_head": (vocabulary, hidden)}


def _notes(
    adapters: Sequence[AdapterShapes], shapes: BaseShapes, targets: Sequence[str] | None, spare: int, over: bool
) -> list[str]:
    places = {place_of(name.removesuffix(".weight")) for name in shapes.tensors}
    notes = []
    for adapter in adapters:
        strange = [module for module in adapter.ranks if place_of(module) not in places and module != "lm_head"]
        if strange:
            notes.append(f"{adapter.name}: {len(strange)} modules are not in this base, such as {strange[0]}")
    if over:
        notes.append("these adapters do not fit: more memory, a lower rank, or on a GPU --max-loras below their number")
    if targets is None:
        notes.append("vLLM wraps every layer of this architecture, as --lora-target-modules is not safe here")
    if spare:
        notes.append("on a CPU one slot stays empty, and the time of an adapter's tokens grows with --max-lora-rank")
    return notes
