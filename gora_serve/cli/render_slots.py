"""What `plan -a` prints: the slots, one line for each adapter, and what would make them smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.cli.render import Summary
from gora_serve.errors import printable

if TYPE_CHECKING:
    from gora_serve.serving.slots import InSlot, SlotPlan

MIB, GIB = 2**20, 2**30
_NAMED = 3


def slots_summary(base: str, plan: SlotPlan, memory: int, weights: int, cache: int, notes: Sequence[str]) -> Summary:
    """Bytes in JSON, MiB and GiB in words."""
    value: dict[str, Any] = {
        "base": base, "max_lora_rank": plan.bucket, "slots": plan.slots, "wrapped_layers": plan.wrapped,
        "slot_bytes": plan.slot_bytes, "slots_bytes": plan.bytes, "weights_bytes": weights, "cache_bytes": cache,
        "memory": memory, "adapters_that_fit": plan.fits, "adapters": [asdict(one) for one in plan.adapters],
        "lower": None if plan.lower is None else {
            "max_lora_rank": plan.lower, "saved_bytes": plan.saved, "forcing": plan.forcing,
        }, "notes": list(notes),
    }  # fmt: skip
    lines = [
        f"{base}: {plan.slots} slots of {_mib(plan.slot_bytes)} MiB at --max-lora-rank {plan.bucket}, "
        f"{_mib(plan.bytes)} MiB in all ({plan.wrapped} layers)",
        f"{plan.fits} such adapters fit {memory / GIB:.2f} GiB, beside {weights / GIB:.2f} GiB of weights and "
        f"{cache / GIB:.2f} GiB of KV cache",
        *_lower(plan),
        *(f"note: {note}" for note in notes),
    ]
    return Summary(value, lines, [_table(plan)])


def _lower(plan: SlotPlan) -> list[str]:
    if plan.lower is None:
        return ["a lower rank saves nothing: this is the smallest slot"]
    share = plan.saved / plan.bytes if plan.bytes else 0.0
    lines = [
        f"at --max-lora-rank {plan.lower} all slots would take {_mib(plan.saved)} MiB less ({share:.0%}): "
        f"fit --rank-max {plan.lower}, or convert with a lower --rank"
    ]
    for name, modules in plan.forcing.items():
        named = ", ".join(f"{path} (rank {rank})" for path, rank in list(modules.items())[:_NAMED])
        more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
        alone = " alone" if len(modules) == 1 and len(plan.forcing) == 1 else ""
        lines.append(f"  {name}: {named}{more}{alone} force{'s' if len(modules) == 1 else ''} {plan.bucket}")
    return lines


def _table(plan: SlotPlan) -> Table:
    names = ("adapter", "modules", "largest rank", "needs", "slot fill", "file MiB", "as --form padded")
    table = Table(*names, title="--form padded saves nothing in vLLM: slots are padded anyway", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in plan.adapters:
        table.add_row(*(Text(printable(cell)) for cell in _cells(one)))
    return table


def _cells(one: InSlot) -> list[str]:
    sizes = [_mib(one.file_bytes), _mib(one.padded_bytes)]
    return [one.name, str(one.modules), str(one.largest), str(one.bucket), f"{one.fill:.0%}", *sizes]


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}" if size < 1000 * MIB else f"{size / MIB:,.0f}"
