"""What `plan` prints: parameters, one line for each job and way of offloading, and what to do with the memory."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from gora_serve.cli.render import Summary
from gora_serve.config import PlanConfig
from gora_serve.errors import counted
from gora_serve.integrity.levels import Level
from gora_serve.training.advice import Advice, least
from gora_serve.training.memory import GIB, MemoryPlan, Need, Parts

DTYPES = {4: "float32", 2: "bfloat16"}


def memory_summary(base: str, plan: MemoryPlan, config: PlanConfig, memory: int, advice: Advice | None) -> Summary:
    """Bytes in JSON, GiB in the table."""
    value: dict[str, Any] = {
        "base": base,
        "level": Level.HEADER.value,
        "parameters": plan.parameters,
        "adapter_parameters": plan.adapter_parameters,
        "targets": plan.targets,
        "expert_parameters": plan.experts,
        "config": asdict(config),
        "needs": [_need_json(need) for need in plan.needs],
        "memory": memory,
        "advice": None if advice is None else {
            "options": list(advice.options), "probe": advice.probe, "offload": advice.offload, "auto": advice.auto,
            "gradient_checkpointing": advice.checkpointing, "peak": advice.peak.device.total,
        },
    }  # fmt: skip
    return Summary(value, [*_head(base, plan, config), *_advice(plan, config, memory, advice)], [_table(plan, config)])


def _need_json(need: Need) -> dict[str, Any]:
    sides = {"device": need.device, "host": need.host}
    parts = {name: {**asdict(side), "total": side.total} for name, side in sides.items()}
    return {"job": need.job, "offload": need.offload, "gradient_checkpointing": need.checkpointing, **parts}


def _head(base: str, plan: MemoryPlan, config: PlanConfig) -> list[str]:
    dtype = DTYPES.get(plan.dtype_bytes, f"{8 * plan.dtype_bytes} bits each") + (
        ", linear layers nf4" if config.model.quantize == "nf4" else ""
    )
    dtype += f", mixed precision {config.mixed_precision}" if config.mixed_precision != "no" else ""
    lines = [
        f"{base}: {plan.parameters:,} parameters ({dtype})",
        f"adapter: {plan.adapter_parameters:,} parameters in {counted(plan.targets, 'module')} "
        f"at rank {config.ranks.rank}",
    ]
    if plan.experts:
        lines.append(f"  of the base, {plan.experts:,} are in experts, which get no adapter")
    shared = ", weights sharded" if config.sharded else ", weights in each"
    lines.append(
        f"a micro-batch of {config.data.batch_size} x {config.data.max_length} tokens, on "
        + ("one " if config.processes == 1 else f"{config.processes} ")
        + config.device.upper()
        + ("" if config.processes == 1 else f"s{shared}" if config.device == "gpu" else f" processes{shared}")
    )
    return lines


def _advice(plan: MemoryPlan, config: PlanConfig, memory: int, advice: Advice | None) -> list[str]:
    room = f"{_gib(memory)} GiB" + (" on each device" if config.processes > 1 and config.device == "gpu" else "")
    if advice is None:
        sparing = f"the most sparing settings take {_gib(least(plan))} GiB"
        return [f"nothing fits {room}: {sparing}; lower --batch-size or --max-length, or --quantize nf4"]
    peak = advice.peak
    options = " ".join(advice.options)
    return [
        f"fits {room}: fit {options} (peak {_gib(peak.device.total)} GiB, in {peak.job})",
        f"  --probe auto takes {advice.auto} there",
    ]


_HEADS = {"statistics": "statis-\ntics", "activations": "activa-\ntions"}  # 80 columns hold all parts


def _table(plan: MemoryPlan, config: PlanConfig) -> Table:
    """The parts of each job, saved by nothing in its first line, by offloading and checkpointing in the others."""
    left_out = {"holes": config.device != "cpu", "copies": config.mixed_precision == "no"}
    names = [field.name for field in fields(Parts) if not left_out.get(field.name)]
    totals = ["device", "host"] if config.device == "gpu" else ["total"]
    table = Table("job,\nsaved by", title="GiB at the peak", title_justify="left", padding=0, show_edge=False)
    for name in (*names, *totals):
        table.add_column(_HEADS.get(name, name), justify="right", vertical="bottom")
    for index, need in enumerate(plan.needs):
        cells = [_gib(getattr(need.device, name)) for name in names]
        ends = index + 1 == len(plan.needs) or plan.needs[index + 1].job != need.job
        sums = [_gib(side.total) for side in (need.device, need.host)[: len(totals)]]
        table.add_row(_manner(need) or need.job, *cells, *sums, end_section=ends)
    return table


def _manner(need: Need) -> str:
    if need.offload != "none":
        return f" offload {need.offload}"
    return " checkpointing" if need.checkpointing else ""


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"
