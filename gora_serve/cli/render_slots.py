"""What `plan -a` prints: the slots or the pools, one line for each adapter, and what would make them smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.cli.render import Summary
from gora_serve.errors import counted, listed, printable
from gora_serve.serving.slots import PoolPlan

if TYPE_CHECKING:
    from gora_serve.capacity import Capacity
    from gora_serve.serving.slots import InPools, InSlot, SlotPlan

MIB, GIB = 2**20, 2**30
_NAMED = 3


def capacity_summary(base: str, found: Capacity, memory: int) -> Summary:
    """Bytes in JSON, MiB and GiB in words."""
    plan = found.plan
    value: dict[str, Any] = {
        "base": base, "plugin": found.plugin, "layout": _layout(plan),
        "buffers_bytes": plan.bytes,
        **(_pools_value(plan) if isinstance(plan, PoolPlan) else _slots_value(plan)),
        "weights_bytes": found.weights, "cache_bytes": found.cache, "engine_bytes": found.engine, "memory": memory,
        "adapters_that_fit": plan.fits, "adapters": [asdict(one) for one in plan.adapters],
        "notes": list(found.notes),
    }  # fmt: skip
    told, table = _pools(base, plan) if isinstance(plan, PoolPlan) else _slots(base, plan)
    lines = [told[0], _fits(found, memory), *told[1:], *(f"note: {note}" for note in found.notes)]
    return Summary(value, lines, [table])


def _layout(plan: SlotPlan | PoolPlan) -> str:
    return "pools" if isinstance(plan, PoolPlan) else "layers" if plan.by_layer else "slots"


def _fits(found: Capacity, memory: int) -> str:
    parts = [f"{found.weights / GIB:.2f} GiB of weights", f"{found.cache / GIB:.2f} GiB of KV cache"]
    told = f"{counted(found.plan.fits, 'such adapter fits', 'such adapters fit')} {memory / GIB:.2f} GiB, beside "
    if found.engine is None:
        return f"{told}{' and '.join(parts)}; activations and CUDA graphs are not counted"
    return f"{told}{', '.join(parts)} and about {found.engine / GIB:.1f} GiB of the engine itself"


def _slots_value(plan: SlotPlan) -> dict[str, Any]:
    return {
        "max_lora_rank": plan.bucket, "slots": plan.slots, "wrapped_layers": plan.wrapped,
        "slot_bytes": plan.slot_bytes, "slots_bytes": plan.bytes,
        "lower": None if plan.lower is None else {
            "max_lora_rank": plan.lower, "saved_bytes": plan.saved, "forcing": plan.forcing,
        },
    }  # fmt: skip


def _pools_value(plan: PoolPlan) -> dict[str, Any]:
    return {"max_lora_rank": plan.rank, "slots": plan.slots, "layers": plan.layers, "lower": None}


def _slots(base: str, plan: SlotPlan) -> tuple[list[str], Table]:
    told = (
        f"{base}: {counted(plan.slots, 'slot')} of {_mib(plan.slot_bytes)} MiB at --max-lora-rank {plan.bucket}, "
        f"{_mib(plan.bytes)} MiB in all ({counted(plan.wrapped, 'layer')})"
    )
    return [told, *_lower(plan)], _slots_table(plan)


def _pools(base: str, plan: PoolPlan) -> tuple[list[str], Table]:
    return [
        f"{base}: {_mib(plan.bytes)} MiB of LoRA buffers in {counted(plan.layers, 'layer')}, by the ranks that each "
        "adapter has there: the plugin's, which serve uses on a CPU (--no-plugin: vLLM's own)",
        "memory follows the sum of all ranks: lower it with --rank of fit or convert",
    ], _pools_table(plan)


def _lower(plan: SlotPlan) -> list[str]:
    if plan.lower is None:
        return ["a lower rank saves nothing: this is the smallest slot"]
    share = plan.saved / plan.bytes if plan.bytes else 0.0
    lines = [
        f"at --max-lora-rank {plan.lower} all slots would take {_mib(plan.saved)} MiB less ({share:.0%}): "
        f"fit --rank-max {plan.lower}, or convert with a lower --rank"
    ]
    for name, modules in plan.forcing.items():
        named = listed((f"{path} (rank {rank})" for path, rank in modules.items()), _NAMED)
        alone = " alone" if len(modules) == 1 and len(plan.forcing) == 1 else ""
        lines.append(f"  {name}: {named}{alone} force{'s' if len(modules) == 1 else ''} {plan.bucket}")
    return lines


def _slots_table(plan: SlotPlan) -> Table:
    names = ("adapter", "modules", "largest rank", "needs", "slot fill", "file MiB", "as --form padded")
    title = "--form padded saves nothing in vLLM: slots are padded anyway"
    if plan.by_layer:
        title = "--form padded takes more: the ranks of all layers become the largest"
    return _table(names, title, map(_slot_cells, plan.adapters))


def _pools_table(plan: PoolPlan) -> Table:
    names = ("adapter", "modules", "largest rank", "MiB", "as --form padded", "file MiB")
    return _table(names, "--form padded takes more: its zero rows count too", map(_pool_cells, plan.adapters))


def _table(names: Sequence[str], title: str, rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*names, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in rows:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _slot_cells(one: InSlot) -> list[str]:
    sizes = [_mib(one.file_bytes), _mib(one.padded_bytes)]
    return [one.name, str(one.modules), str(one.largest), str(one.bucket), f"{one.fill:.0%}", *sizes]


def _pool_cells(one: InPools) -> list[str]:
    sizes = [_mib(one.bytes), _mib(one.padded_bytes), _mib(one.file_bytes)]
    return [one.name, str(one.modules), str(one.largest), *sizes]


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}" if size < 1000 * MIB else f"{size / MIB:,.0f}"
