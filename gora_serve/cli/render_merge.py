"""What people see of a merge, and of a merge that was replayed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gora_serve.adapter.names import kinds_and_layers
from gora_serve.cli.render import Summary
from gora_serve.errors import printable

if TYPE_CHECKING:
    from converters.merge_receipt import MergedModel
    from gora_serve.deploy.tally import Tally


def model_summary(done: MergedModel) -> Summary:
    """A merged model; as JSON it is merge.json with the folder that it lies in."""
    totals = done.receipt["totals"]
    lines = [_adapter_line(one.to_json()) for one in done.adapters]
    lines += [f"note: {note}" for note in done.notes]
    lines.append(f"wrote {done.folder}: {totals['tensors']} tensors merged, {done.receipt['unchanged']} as they were")
    lines.append(f"weights root {done.roots.weights}")
    lines.append(
        f"{totals['changed']:,} of {totals['elements']:,} elements changed; {totals['held']:.1%} of the update is stored"
    )
    if "error_on_stored" in totals:
        lines.append(
            f"away from the model in training: {_share(totals, 'error_on_stored')} of the update on the weights as "
            f"stored, {_share(totals, 'error_on_quantized')} on those in 4 bits"
        )
    if done.faint:
        lines.append(
            f"of {len(done.faint)} tensors less than half of the update is stored, it is too small for their type "
            f"(--dtype float32 keeps it): {', '.join(done.faint[:3])}{' ...' if len(done.faint) > 3 else ''}"
        )
    return Summary({"model": str(done.folder), **done.receipt}, lines, [_table(done)])


def _adapter_line(one: dict[str, object]) -> str:
    return f"{one['adapter']}: {one['family']}, weight {one['weight']:g}" + (f", {one['method']}" if one["method"] else "")


def _share(totals: dict[str, float], name: str) -> str:
    return f"{totals[name] / totals['update']:.1%}" if totals["update"] else f"{totals[name]:.3g}"


def _table(done: MergedModel) -> Table:
    table = Table("tensor", "number", "|dW|", "changed", "stored", "largest error")
    tallies = {name.removesuffix(".weight"): one for name, one in done.written.tallies.items()}
    kinds: dict[str, list[Tally]] = {}
    for path, (kind, _) in kinds_and_layers(tallies).items():
        kinds.setdefault(kind, []).append(tallies[path])
    for kind, some in kinds.items():
        squares, along = sum(one.squared_update for one in some), sum(one.along for one in some)
        changed = sum(one.changed for one in some) / max(1, sum(one.elements for one in some))
        table.add_row(
            Text(printable(kind)), str(len(some)), f"{math.sqrt(squares):.3g}", f"{changed:.1%}",
            f"{1 + along / squares if squares else 1:.1%}", f"{max(one.max_error for one in some):.1e}",
        )  # fmt: skip
    return table
