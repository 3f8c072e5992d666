"""From a base and adapter folders to what they take in vLLM: headers and configuration alone are read.

vLLM's own LoRA layers have slots of one rank; the plugin, where `serve` turns it on, has its own sizes, and they are
asked of the code that the engine runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gora_serve.config import ServeConfig
from gora_serve.errors import UsageError, counted
from gora_serve.integrity.headers import DTYPE_BITS
from gora_serve.serving.adapter_dir import read_adapter_dir
from gora_serve.serving.fits import ADAPTED_EMBEDDINGS, place_of
from gora_serve.serving.plan import architecture, plugin_settings, refuse_encoder_decoder, uses_plugin
from gora_serve.serving.plugin import Declared
from gora_serve.serving.room import rank_bucket, slots, target_modules
from gora_serve.serving.served import ServedAdapter, read_served_adapters
from gora_serve.serving.served_dtype import served_dtype
from gora_serve.serving.slots import AdapterShapes, PoolPlan, Shape, SlotPlan, plan_pools, plan_slots, wrapped_layers
from gora_serve.training.shapes import DTYPE_BYTES, BaseShapes, read_shapes
from gora_serve.vllm_plugin.sizes import declared_in, layer_of, pool_rows, slot_rank

CACHE = ServeConfig.kv_cache_gib * 2**30  # bytes that serving keeps for the KV cache at least
# Bytes that all processes of a server on a CPU take beside weights, cache and adapters. Of
# benchmarks/results/deployment.json: 3.5 GB with SmolLM2-135M in bfloat16 (0.27 GB) and 1 GiB of cache.
ENGINE = 2_200_000_000


@dataclass(frozen=True)
class Capacity:
    """What the adapters take, and what lies beside it: bytes of weights, of the KV cache, and of the engine itself.

    plugin: whether these are the plugin's buffers. engine: None on a GPU, of which it was not measured. notes: what to
    know of them.
    """

    plan: SlotPlan | PoolPlan
    plugin: bool
    weights: int
    cache: int
    engine: int | None
    notes: tuple[str, ...]


def capacity(
    base: Path,
    named: Sequence[tuple[str, Path]],
    *,
    device: Literal["gpu", "cpu"],
    dtype: str,
    memory: int,
    plugin: bool | None = None,
    given: Path | None = None,
) -> Capacity:
    """Reckon what these adapters take in a server, and how many adapters of their ranks `memory` bytes hold.

    Adapters that `serve` would refuse by their headers are refused here too, all faults at once. dtype: of weights and
    slots, as vLLM's `--dtype` has it. plugin: as for `serve`. given: the base in the commands that are advised.
    Raises what the readers of bases and adapters raise.
    """
    served = read_served_adapters(named, given)
    if len({name for name, _ in named}) < len(named):
        raise UsageError("two adapters have the same name", code="GS-2472", hint="name them: -a NAME=DIR")
    refuse_encoder_decoder(base)
    shapes, kind = read_shapes(base), architecture(base)
    found = [_adapter(name, path) for name, path in named]
    config = ServeConfig(device="cpu" if device == "cpu" else "cuda", plugin=plugin)
    targets = target_modules(served, kind)
    wrapped = wrapped_layers(shapes.linears, _ends(shapes, kind), targets)
    width = DTYPE_BYTES.get(served_dtype(dtype, shapes.dtype, shapes.settings.kind), shapes.dtype_bytes)
    weights, engine = shapes.parameters * width, ENGINE if device == "cpu" else None
    room = max(0, memory - weights - CACHE - (engine or 0))
    plan = _plan(served, found, wrapped, config, kind, width, room)
    on = uses_plugin(config)
    notes = [*_strange(found, shapes), *_notes(plan, config, targets is None, plan.bytes > room)]
    return Capacity(plan, on, weights, CACHE, engine, tuple(notes))


def _plan(
    served: Sequence[ServedAdapter],
    found: Sequence[AdapterShapes],
    wrapped: dict[str, Shape],
    config: ServeConfig,
    kind: str | None,
    width: int,
    room: int,
) -> SlotPlan | PoolPlan:
    """Reckon what the engine makes: the plugin is asked with what it would be told."""
    known = declared_in(plugin_settings(served, config, kind))
    number, spare = slots(len(served), config.device, live=False), slots(0, config.device, live=False)
    largest = rank_bucket(max(adapter.largest for adapter in found))
    if known is None:  # without the plugin, or where it is not told the ranks, every slot has the largest
        return plan_slots(found, wrapped, slots=number, spare=spare, width=width, room=room)
    if config.device == "cpu":
        rows = {path: pool_rows(known, path, number, largest) for path in wrapped}
        layers = len({layer_of(path) for path in wrapped})
        return plan_pools(found, wrapped, rows, slots=number, layers=layers, width=width, room=room)
    ranks = _slot_ranks(known, wrapped, largest)
    return plan_slots(found, wrapped, slots=number, spare=spare, width=width, room=room, ranks=ranks)


def _slot_ranks(known: Declared, wrapped: dict[str, Shape], largest: int) -> dict[str, int]:
    return {path: slot_rank(known, *layer_of(path), largest) for path in wrapped}


def _adapter(name: str, path: Path) -> AdapterShapes:
    read = read_adapter_dir(name, path)
    pairs = {module: (pair.A, pair.B) for module, pair in read.pairs.items() if pair.A and pair.B}
    ranks = {module: A.shape[0] for module, (A, _) in pairs.items()}
    shapes = {module: (B.shape[0], A.shape[1]) for module, (A, B) in pairs.items()}
    width = max((DTYPE_BITS[A.dtype] // 8 for A, _ in pairs.values()), default=4)
    return AdapterShapes(name, ranks, shapes, width)


def _ends(shapes: BaseShapes, kind: str | None) -> dict[str, Shape]:
    """Return embeddings and head, which vLLM wraps for some classes even where no adapter has them."""
    if kind not in ADAPTED_EMBEDDINGS:
        return {}
    hidden, vocabulary = shapes.settings.hidden, shapes.settings.vocabulary
    return {"model.embed_tokens": (hidden, vocabulary), "lm_head": (vocabulary, hidden)}


def _strange(adapters: Sequence[AdapterShapes], shapes: BaseShapes) -> list[str]:
    places = {place_of(name.removesuffix(".weight")) for name in shapes.tensors}
    notes = []
    for adapter in adapters:
        strange = [module for module in adapter.ranks if place_of(module) not in places and module != "lm_head"]
        if strange:
            are = counted(len(strange), "module is", "modules are")
            notes.append(f"{adapter.name}: {are} not in this base, such as {strange[0]}")
    return notes


def _notes(plan: SlotPlan | PoolPlan, config: ServeConfig, everything: bool, over: bool) -> list[str]:
    notes = []
    if over:
        notes.append("these adapters do not fit: more memory, a lower rank, or on a GPU --max-loras below their number")
    if isinstance(plan, PoolPlan):
        return notes
    if everything:
        notes.append("vLLM wraps every layer of this architecture, as --lora-target-modules is not safe here")
    if plan.by_layer:
        notes.append("with the plugin each layer has the largest of its own ranks; it was not run on a GPU yet")
    if config.device == "cpu" and uses_plugin(config):
        notes.append("the plugin is not told the ranks here: each slot has --max-lora-rank in every layer")
    elif config.device == "cpu":
        notes.append("on a CPU one slot stays empty, and the time of an adapter's tokens grows with --max-lora-rank")
    return notes
