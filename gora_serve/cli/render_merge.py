"""What people see of a merge, and of a merge that was replayed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gora_serve.adapter.names import by_kind
from gora_serve.cli.render import Summary
from gora_serve.errors import MismatchError, counted, printable
from gora_serve.integrity.levels import Level

if TYPE_CHECKING:
    from converters.merge_receipt import MergedModel
    from converters.merging import Checked


def model_summary(done: MergedModel) -> Summary:
    """A merged model; as JSON it is merge.json with the folder that it lies in."""
    totals = done.receipt["totals"]
    lines = [_adapter_line(one.to_json()) for one in done.adapters]
    lines += [f"note: {note}" for note in done.notes]
    merged = counted(totals["tensors"], "tensor")
    lines.append(f"wrote {done.folder}: {merged} merged, {done.receipt['unchanged']} as before")
    lines.append(f"weights root {done.roots.weights}")
    stored = f"; {totals['held']:.1%} of the update is stored" if totals["update"] else ""
    lines.append(f"{totals['changed']:,} of {totals['elements']:,} elements changed{stored}")
    if "error_on_stored" in totals:
        lines.append(
            f"away from the model in training: {_share(totals, 'error_on_stored')} of the update on the weights as "
            f"stored, {_share(totals, 'error_on_quantized')} on those in 4 bits"
        )
    if done.faint:
        lines.append(
            f"of {counted(len(done.faint), 'tensor')} less than half of the update is stored, too small for the type "
            f"(--dtype float32 keeps it): {', '.join(done.faint[:3])}{' ...' if len(done.faint) > 3 else ''}"
        )
    return Summary({"model": str(done.folder), **done.receipt}, lines, [_table(done)])


_SAID = {
    "exact": "bit-exact: every tensor has the bytes that this merge gives",
    "rounded": "within rounding: no element is off by more than its type and the rounding of factors explain",
    "differs": "this is not that merge",
}
_SHOWN = 5


def replay_summary(done: Checked) -> Summary:
    """What holding a model against a merge has shown."""
    from gora_serve.deploy.replay import WORST_FIRST

    replay = done.replay
    counts = {verdict: len(replay.of(verdict)) for verdict in WORST_FIRST}
    names = ", ".join(f"{one.path} ({one.detection.family}, weight {one.weight:g})" for one in done.adapters)
    lines = [
        f"{done.folder} against {done.base.path} with {names}",
        f"{counted(counts['exact'], 'tensor')} bit-exact, {counts['rounded']} within rounding, "
        f"{counted(counts['differs'], 'differs', 'differ')}",
        f"{_SAID[replay.verdict]} ({Level.BYTES.value})",
    ]
    what = "what NF4 makes of the weights" if done.added_to.base_as == "nf4" else "the weights as stored"
    lines.insert(1, f"updates added to {what} ({done.added_to.said_by})")
    lines += ["its files are those of its manifest"] if done.sealed and replay.verdict != "differs" else []
    value = {
        "path": str(done.folder), "base": str(done.base.path), "verdict": replay.verdict, "counts": counts,
        "verified": replay.verdict != "differs", "level": Level.BYTES.value,
        "base_as": done.added_to.base_as, "base_as_by": done.added_to.said_by,
        "adapters": [{"adapter": str(one.path), "weight": one.weight, "family": one.detection.family}
                     for one in done.adapters],
        "tensors": {name: one.to_json() for name, one in replay.tensors.items()}, "warnings": list(done.warnings),
    }  # fmt: skip
    return Summary(value, lines)


def refusal(done: Checked) -> MismatchError:
    """Return the answer no (GS-1400), with the first tensors that differ."""
    wrong = done.replay.of("differs")
    first = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    listed = "; ".join(f"{one.name}: {one.reason}" for one in wrong[1:_SHOWN])
    return MismatchError(
        f"a tensor is not what the merge gives{more}: {first.reason}", code="GS-1400", file=done.folder,
        tensor=first.name, actual=listed or None,
        hint="check the adapters and their weights; or merge again: gora-serve merge",
    )  # fmt: skip


def _adapter_line(one: dict[str, object]) -> str:
    how = f", {one['method']}" if one["method"] else ""
    return f"{one['adapter']}: {one['family']}, weight {one['weight']:g}{how}"


def _share(totals: dict[str, float], name: str) -> str:
    return f"{totals[name] / totals['update']:.1%}" if totals["update"] else f"{totals[name]:.3g}"


def _table(done: MergedModel) -> Table:
    table = Table("tensor", "number", "|dW|", "changed", "stored", "largest error")
    tallies = {name.removesuffix(".weight"): one for name, one in done.written.tallies.items()}
    for kind, paths in by_kind(tallies).items():
        some = [tallies[path] for path in paths]
        squares, along = sum(one.squared_update for one in some), sum(one.along for one in some)
        changed = sum(one.changed for one in some) / max(1, sum(one.elements for one in some))
        table.add_row(
            Text(printable(kind)), str(len(some)), f"{math.sqrt(squares):.3g}", f"{changed:.1%}",
            f"{1 + along / squares:.1%}" if squares else "-", f"{max(one.max_error for one in some):.1e}",
        )  # fmt: skip
    return table
