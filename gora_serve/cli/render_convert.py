"""What people see of a conversion: the family and why, ranks and errors by kind of module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gora_serve.adapter.names import by_kind
from gora_serve.cli.render import Summary
from gora_serve.errors import counted, printable

if TYPE_CHECKING:
    from converters.receipt import Converted
    from gora_serve.adapter.measure import ModuleError


def convert_summary(done: Converted) -> Summary:
    """A conversion; as JSON it is conversion.json with the folder that it lies in."""
    reading, detection = done.reading, done.detection
    kept = [module for module in done.modules.values() if module.rank]
    left = len(done.modules) - len(kept)
    lines = [f"family {detection.family}: {'; '.join(detection.evidence)}"]
    lines += [f"not certain: {need}" for need in detection.needs if detection.confidence != "certain"]
    lines += [f"how: {reading.method}"] if reading.method else []
    lines += [f"note: {note}" for note in reading.notes]
    lines.append(f"wrote {done.folder}")
    lines.append(f"{counted(len(kept), 'module')}, ranks {rank_span(module.rank for module in kept)}")
    lines += [f"left out: {counted(left, 'module')} whose update is zero, or below what is kept"] if left else []
    lines += [f"carried as they are: {_some(sorted(reading.carried))}"] if reading.carried else []
    cause = error_cause(done.error, done.truncated)
    lines.append(f"error of the written update, over all modules: {done.error:.2e} ({cause})")
    value = {"adapter": str(done.folder), "warnings": list(done.warnings), **done.receipt}
    return Summary(value, lines, [module_table(done.modules)])


def _some(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more (tensors.carried in conversion.json)" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def error_cause(error: float, truncated: float) -> str:
    """Say what an error comes from."""
    return f"truncation alone: {truncated:.2e}" if truncated > 1e-3 * error else "rounding"


def module_table(of: Mapping[str, ModuleError]) -> Table:
    """Ranks and relative errors by kind of module."""
    table = Table("module", "number", "rank", "rank before", "|dW|", "truncated", "error")
    for kind, paths in by_kind(of).items():
        modules = [of[path] for path in paths]
        norm = sum(module.norm**2 for module in modules) ** 0.5
        shares = [
            sum(getattr(module, name) ** 2 for module in modules) ** 0.5 / norm if norm else 0.0
            for name in ("truncated", "error")
        ]
        table.add_row(
            Text(printable(kind)), str(len(modules)), rank_span(module.rank for module in modules),
            rank_span(module.full_rank for module in modules), f"{norm:.3g}", *(f"{share:.1e}" for share in shares),
        )  # fmt: skip
    return table


def rank_span(ranks: Iterable[int]) -> str:
    """Say the smallest and the largest."""
    found = sorted(ranks)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
