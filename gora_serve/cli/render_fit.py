"""What `fit`, `probe` and `ranks` print: ranks by kind of module, losses, what the probe measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.adapter.names import by_kind
from gora_serve.cli.render import Summary
from gora_serve.errors import counted, printable
from gora_serve.integrity.levels import Level
from gora_serve.integrity.record import trained_on_text

if TYPE_CHECKING:
    from gora_serve.gora.ranks import RankPlan
    from gora_serve.gora.statistics import GradientStatistics
    from gora_serve.training.run import FitResult


def fit_summary(result: FitResult) -> Summary:
    """A finished run: where it is, ranks, parameters, γ, losses."""
    plan, data = result.plan, result.data
    value = {
        "run": str(result.folder),
        "base_checked": [Level.BYTES.value, Level.MEMORY.value],
        "parameters": plan.parameters,
        "lora_parameters": plan.lora_parameters,
        "gamma": result.gamma,
        "losses": dict(result.losses),
        "seconds": dict(result.seconds),
        "trained_on": dict(result.quantization) if result.quantization else None,
        "data": data.summary(),
        "ranks": dict(plan.ranks),
    }
    lines = [f"wrote {result.folder}", "base unchanged: files and memory hashed before and after (L2, L3)"]
    lines += [trained_on_text(result.quantization)] if result.quantization else []
    lines += _data_lines(data.summary())
    if result.gamma is not None:
        lines.append(f"gamma {result.gamma:.4g}")
    lines += [f"loss on the evaluation rows, {name}: {loss:.4f}" for name, loss in result.losses.items()]
    return Summary(value, lines, [rank_table(plan)])


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    lines = [f"data: {data['used']} of {counted(data['rows'], 'row')} of {data['name']}"]
    if data["cut"]:
        were = counted(data["cut"], "row was", "rows were")
        lines.append(f"  {were} cut to --max-length, and lost the end of the completion")
    if data["left_out"]:
        were = counted(data["left_out"], "row was", "rows were")
        lines.append(f"  {were} left out: the prompt alone reaches --max-length")
    return lines


def probe_summary(folder: Path, statistics: GradientStatistics) -> Summary:
    """A probe: how much data, and the mean importance of each kind of module."""

    value = {
        "probe": str(folder), "steps": statistics.steps, "samples": statistics.samples, "tokens": statistics.tokens,
        "loss": statistics.loss, "modules": len(statistics.modules), "mode": statistics.mode,
        "stopped_early": statistics.stopped_early,
    }  # fmt: skip
    metric = next(iter(next(iter(statistics.modules.values())).importance))
    table = Table("module", "number", f"mean {metric}", "mean gradient norm")
    for kind, paths in by_kind(statistics.modules).items():
        chosen = [statistics.modules[path] for path in paths]
        mean = sum(module.importance[metric] for module in chosen) / len(chosen)
        norm = sum(module.gradient_norm for module in chosen) / len(chosen)
        table.add_row(Text(printable(kind)), str(len(chosen)), f"{mean:.3e}", f"{norm:.3e}")
    stopped = ", where the ranks stood still" if statistics.stopped_early else ""
    lines = [
        f"wrote {folder}",
        f"{counted(statistics.steps, 'step')}{stopped}, {statistics.tokens} tokens, mean loss {statistics.loss:.4f}",
        *_sketch_line(statistics),
    ]
    return Summary(value, lines, [table])


def _sketch_line(statistics: GradientStatistics) -> list[str]:
    if statistics.mode != "sketch":
        return []
    modules = statistics.modules.values()
    share = sum(module.rows or 0 for module in modules) / sum(module.shape[0] for module in modules)
    errors = sorted(module.importance_error for module in modules)
    middle, worst = errors[len(errors) // 2], errors[-1]
    text = (
        f"sketch: {share:.0%} of the gradients' rows; standard error of an importance {middle:.1%}, at most {worst:.1%}"
    )
    return [text]


def ranks_summary(plan: RankPlan, output: Path | None, plot: Path | None) -> Summary:
    """A rank allocation; as JSON it is ranks.json itself."""
    from gora_serve.training.run_files import ranks_json

    return Summary(ranks_json(plan), [f"wrote {path}" for path in (output, plot) if path], [rank_table(plan)])


BLOCKS = "▁▂▃▄▅▆▇█"


def rank_table(plan: RankPlan) -> Table:
    """Ranks by kind of module, with a small curve over the layers."""
    share = plan.parameters / plan.lora_parameters
    title = f"{plan.parameters:,} parameters, {share:.1%} of LoRA's at rank {plan.rank}"
    table = Table("module", "number", "least", "mean", "most", "first to last layer", title=title, title_justify="left")
    highest = max(plan.ranks.values())
    for kind, paths in by_kind(plan.ranks).items():
        ranks = [plan.ranks[path] for path in paths]
        curve = "".join(BLOCKS[min(7, 8 * rank // (highest + 1))] for rank in ranks)
        mean = f"{sum(ranks) / len(ranks):.1f}"
        table.add_row(Text(printable(kind)), str(len(ranks)), str(min(ranks)), mean, str(max(ranks)), curve)
    return table
