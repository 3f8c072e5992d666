"""Whether an adapter that is being loaded can be served: its values, and room in the layers' buffers for its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from typing import Any

from gora_serve.errors import BindingError
from gora_serve.vllm_plugin.pool import PooledStack
from gora_serve.vllm_plugin.sizes import declared, headroom_for, later_slots

HEADROOM = "start again with --rank-headroom {}"
MORE_SLOTS = "start again with this adapter among the others, or with one slot more (-- --max-loras)"


def check_fit(manager: Any, lora: Any, name: str) -> None:
    """Raise BindingError (GS-4801), with the headroom that would be enough, before anything has changed.

    manager: vLLM's LoRA manager. lora: the adapter as it was read. All that are loaded count, also those that have no
    slot at the moment, but no more of them than there are slots beside this one's, the largest: then whatever a batch
    asks for fits.
    """
    others = _staying(manager, lora.id)
    known, slots = declared(), manager.lora_slots
    lacking: list[tuple[int, str, int, int, str]] = []  # headroom that is enough, layer, rank, rank that fits, advice
    for where, layer in manager.modules.items():
        ranks = ranks_in(manager, lora, where)
        if not any(ranks):
            continue
        stack = getattr(layer, "lora_a_stacked", None)
        if isinstance(stack, PooledStack):
            taken = [ranks_in(manager, other, where) for other in others]
            for index, room in enumerate(stack.pool.room):
                beside = nlargest(slots - 1, (_at(one, index) for one in taken))
                rank, free = _at(ranks, index), room - sum(beside)
                if rank > free:
                    headroom = headroom_for(known, rank - free, slots)
                    advice = MORE_SLOTS if known and not later_slots(known, slots) else HEADROOM.format(headroom)
                    lacking.append((headroom, where, rank, free, advice))
        elif hasattr(layer, "slot_rank") and max(ranks) > layer.slot_rank:
            lacking.append((max(ranks), where, max(ranks), layer.slot_rank, HEADROOM.format(max(ranks))))
    if lacking:
        _, where, rank, free, advice = max(lacking)
        raise BindingError(
            f"the adapter {name} does not fit into the buffers of the engine", code="GS-4801", tensor=where,
            expected=f"rank <= {free}", actual=rank, hint=advice,
        )  # fmt: skip


def check_finite(lora: Any, name: str) -> None:
    """Raise BindingError (GS-4802) for NaN or infinity, before anything has changed.

    lora: the adapter as it was read, in the engine's dtype; vLLM multiplies B by the scale later.
    """
    for weights in lora.loras.values():
        if not (weights.lora_a.isfinite().all() and (weights.lora_b * weights.scaling).isfinite().all()):
            raise BindingError(
                f"the adapter {name} has values that are not finite in {weights.lora_b.dtype}", code="GS-4802",
                tensor=weights.module_name,
                hint="train or convert the adapter again, or serve with --dtype float32",
            )  # fmt: skip


def ranks_in(manager: Any, lora: Any, layer: str) -> tuple[int, ...]:
    """Return an adapter's ranks in a layer, by slice, also before vLLM has packed it; () where it has none."""
    weights = lora.loras.get(layer)
    if weights is not None:
        parts = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
        return tuple(0 if part is None else int(part.shape[0]) for part in parts)
    found = [lora.loras.get(part) for part in manager.packed_modules.get(layer, ())]
    return tuple(0 if one is None else int(one.lora_a.shape[0]) for one in found)


def _staying(manager: Any, loading: int) -> list[Any]:
    """Return the adapters that are loaded once this one is: when the cache is full, the oldest goes."""
    held = [lora for number, lora in manager.list_adapters().items() if number != loading]
    return held[max(len(held) + 1 - manager.capacity, 0) :]


def _at(ranks: Sequence[int], index: int) -> int:
    """Return the rank of a slice; a factor that vLLM will split has one rank for all."""
    return ranks[index] if index < len(ranks) else max(ranks, default=0)
