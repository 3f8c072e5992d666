"""What people see of the gap: the answer in a few lines, tables by kind of module, the same as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.adapter.engine_ranks import LARGEST_RANK
from gora_serve.adapter.names import by_kind
from gora_serve.cli.render import Summary
from gora_serve.errors import MismatchError, counted, printable

if TYPE_CHECKING:
    from converters.gap import GapReport
    from gora_serve.deploy.gap import Gap
    from gora_serve.training.compare import Comparison

SCHEMA = "gora-serve/gap/1"
NOBODY = "no engine loads it as LoRA"


def refusal(report: GapReport, sources: Sequence[str] = (), kept: Sequence[str] = ()) -> MismatchError:
    """Return the answer "no" as an error. It is printed, not raised: standard output keeps the whole report.

    Options of this call that the next command needs too: sources, of all that read adapters; kept, of `convert` alone.
    """
    hint = _way(report, sources, kept)
    if not report.gap.loads:
        return MismatchError(NOBODY, code="GS-122", file=report.adapter, hint=hint)
    share = report.gap.shares()["unconverted_of_update"]
    return MismatchError(
        "served as it is, this adapter is wrong", code="GS-121", file=report.adapter,
        expected=f"an error of at most {report.config.threshold:g} of the update",
        actual="an update of zero, served as something" if share is None else f"{share:.3g}", hint=hint,
    )  # fmt: skip


def _way(report: GapReport, sources: Sequence[str], kept: Sequence[str]) -> str:
    """Return the command that converts the adapter; or merges it, where it carries what no engine takes beside LoRA."""
    name = Path(report.adapter.partition("@")[0]).name or "adapter"
    family = ["--from", report.config.family] if report.config.family != "auto" else []
    full_rank = report.reading.full_rank
    if report.reading.adapter.carried and not report.gap.loads and not full_rank:
        words = ["gora-serve", "merge", report.base, "-a", report.adapter, "--output", f"{name}-merged"]
        return shlex.join([*words, *sources, *family])
    words = ["gora-serve", "convert", report.adapter, "--base", report.base, "--output", f"{name}-plain"]
    words += [*sources, *kept, *family]
    too_large = any(module.rank > LARGEST_RANK for module in report.gap.modules.values())
    return shlex.join([*words, *(["--rank", "16"] if full_rank or too_large else [])])


def gap_summary(report: GapReport, plot: Path | None) -> Summary:
    """The gap: as JSON each module, for people the kinds of modules and the total."""
    tables = [_table(report), _costs(report)]
    if report.comparison:
        tables.insert(1, _outcomes(report.comparison))
    lines = _lines(report) + ([f"wrote {plot}"] if plot else [])
    return Summary(_value(report) | {"plot": str(plot) if plot else None}, lines, tables)


def _value(report: GapReport) -> dict[str, Any]:
    gap, comparison = report.gap, report.comparison
    return {
        "schema": SCHEMA,
        "adapter": report.adapter,
        "base": report.base,
        "family": report.detection.family,
        "evidence": list(report.detection.evidence),
        "method": report.reading.method,
        "notes": list(report.reading.notes),
        "warnings": list(report.warnings),
        "full_rank": report.reading.full_rank,
        "settings": asdict(report.config),
        "engine_loads_it": gap.loads,
        "within_threshold": gap.within(report.config.threshold),
        "trained_on": report.lay_in[0] if report.lay_in else "stored",
        "base_rounding_is_an_estimate": gap.estimated,
        "total": gap.norms() | gap.shares(),
        "modules": {path: asdict(module) | gap.shares([path]) for path, module in gap.modules.items()},
        "deployment": [asdict(cost) for cost in report.costs],
        "comparison": asdict(comparison) if comparison else None,
    }


def _lines(report: GapReport) -> list[str]:
    shares = report.gap.shares()
    lines = [f"family {report.detection.family}: {'; '.join(report.detection.evidence)}"]
    lines += [f"how: {report.reading.method}"] if report.reading.method else []
    lines += [f"note: {note}" for note in report.reading.notes]
    lines.append(f"served as it is: {_verdict(report)}")
    lines += _rounding(report)
    if report.reading.full_rank:
        lines.append("its update has full rank: as LoRA it can only be stored truncated (convert --rank, --tolerance)")
    else:
        stored, plain = (_percent(shares[name]) for name in ("stored_of_update", "stored_plain_of_update"))
        lines.append(f"stored in {report.config.dtype}: converted {stored} off, not compressed {plain} off")
    if report.lay_in and shares["quantized_of_weight"] is not None:
        (name, how), error = report.lay_in, _percent(shares["quantized_of_weight"])
        lines.append(f"trained on the base in {name} ({how}): {error} of |W0| off the real one")
    return lines


def _rounding(report: GapReport) -> list[str]:
    shares, gap = report.gap.shares(), report.gap
    if shares["base_rounding_of_update"] is None:
        return []
    error = f"{_of_update(shares['base_rounding_of_update'])}, which no adapter can hold"
    if not gap.estimated:
        return [f"rounding of the edited base, measured: {error}"]
    dtype = report.lay_in[0] if report.lay_in else "the dtype of its files"
    return [f"rounding of the base, if training kept it in {dtype}: {error} (see --mutated-base, --trained-on)"]


def _verdict(report: GapReport) -> str:
    if not report.gap.loads:
        return NOBODY
    shares = report.gap.shares()
    of_update = shares["unconverted_of_update"]
    if of_update == 0:
        return "right, it is plain LoRA on this base"
    worst = max(report.gap.modules, key=lambda path: report.gap.modules[path].unconverted or 0.0)
    error = "off, where the update is zero" if of_update is None else f"the error is {_of_update(of_update)}"
    return f"{error}, {_percent(shares['unconverted_of_weight'])} of |W0|; most in {printable(worst)}"


HEADS: Mapping[str, tuple[str, str]] = {  # share -> the two lines over its column
    "initial_of_weight": ("taken out", "|P0| / |W0|"),
    "unconverted_of_weight": ("unconverted", "/ |W0|"),
    "unconverted_of_update": ("unconverted", "/ |dW|"),
    "base_rounding_of_update": ("base rounding", "/ |dW|"),
    "stored_of_update": ("converted", "/ |dW|"),
    "stored_plain_of_update": ("not compressed", "/ |dW|"),
    "quantized_of_weight": ("4-bit base", "/ |W0|"),
}


def _table(report: GapReport) -> Table:
    """By kind of module, all together last; columns that have nothing to say are left out."""
    gap = report.gap
    total = gap.shares()
    shown = [name for name in HEADS if total[name] is not None]
    kinds = by_kind(gap.modules)
    table = Table("module", "number", "rank", title="Error, Frobenius norms", title_justify="left", padding=0)
    for name in shown:
        table.add_column("\n".join(HEADS[name]), justify="right")
    for kind, paths in kinds.items():
        shares = gap.shares(paths)
        cells = [_number(shares[name]) for name in shown]
        first = (Text(printable(kind)), _changed(gap, paths), _ranks(report, paths))
        table.add_row(*first, *cells, end_section=kind == list(kinds)[-1])
    table.add_row("all", _changed(gap, list(gap.modules)), "", *(_number(total[name]) for name in shown))
    return table


def _changed(gap: Gap, paths: Sequence[str]) -> str:
    """Say how many modules have an update or a part taken out, and of how many where these are more."""
    modules = [gap.modules[path] for path in paths]
    changed = sum(bool(module.update or module.initial or module.unconverted) for module in modules)
    return str(changed) if changed == len(modules) else f"{changed} of {len(modules)}"


def _ranks(report: GapReport, paths: Sequence[str]) -> str:
    if report.reading.full_rank:
        return "full"
    ranks = sorted(report.gap.modules[path].rank for path in paths)
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"


def _outcomes(comparison: Comparison) -> Table:
    title = f"On {counted(comparison.rows, 'row')} of {comparison.data['name']}, {comparison.tokens} tokens, in float32"
    table = Table("model", title=Text(printable(title)), title_justify="left")
    for column in ("loss", "KL(as trained || it)", "same top token"):
        table.add_column(column, justify="right")
    for name, outcome in comparison.outcomes.items():
        table.add_row(name, f"{outcome.loss:.4f}", f"{outcome.kl:.2e}", f"{outcome.agreement:.2%}")
    return table


def _costs(report: GapReport) -> Table:
    tasks = report.costs[0].tasks
    title = f"Adapters in {report.config.dtype}"
    table = Table(f"to deploy {counted(tasks, 'task')}", title=title, title_justify="left")
    for column in ("on disk", "largest rank", "max_lora_rank", "in memory"):
        table.add_column(column, justify="right")
    for cost in report.costs:
        rank = f"{'up to ' if cost.is_bound else ''}{cost.max_rank}" if cost.max_rank else "-"
        bucket = "-" if not cost.max_rank else str(cost.bucket or "none is enough")
        memory = "-" if cost.in_memory is None else _size(cost.in_memory)
        table.add_row(cost.name, _size(cost.stored), rank, bucket, memory)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.2e}"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 10:
        return f"{value:.3g} times"
    return f"{value:.2%}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _of_update(share: float) -> str:
    return f"{_percent(share)} {'the' if share >= 10 else 'of the'} update"


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
