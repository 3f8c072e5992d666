"""What `gap --json` printed: read, and as figure and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gora_serve.adapter.names import by_kind
from gora_serve.report.chart import WIDTH, box, scale_of, words
from gora_serve.report.markup import Figure, Html, Table, exact, join, tag
from gora_serve.report.numbers import percent, short, size
from gora_serve.report.record import Record
from gora_serve.training.run_files import read_object

if TYPE_CHECKING:
    from gora_serve.deploy.gap import Gap, ModuleGap

GAP_SCHEMA = "gora-serve/gap/1"
NAMES: Mapping[str, str] = {
    "unconverted_of_update": "served as it is", "base_rounding_of_update": "rounding of the edited base",
    "stored_plain_of_update": "not compressed, as stored", "stored_of_update": "converted, as stored",
}  # fmt: skip


@dataclass(frozen=True)
class GapFile:
    """One file: what it says, and its modules as the values that shares are computed from."""

    record: Record
    gap: Gap

    @property
    def adapter(self) -> str:
        return self.record.text("adapter") or "unknown"


def read_gap(file: Path) -> GapFile:
    """Read what `gap --json` printed. Raises InputError for another kind of file (GS-379) or odd values (GS-3380)."""
    from gora_serve.deploy.gap import Gap

    record = Record(read_object(file, GAP_SCHEMA), file)
    modules = {path: _module(one) for path, one in record.parts("modules")}
    loads, estimated = record.flag("engine_loads_it"), record.flag("base_rounding_is_an_estimate")
    if not modules or loads is None:
        raise record.malformed("modules" if not modules else "engine_loads_it", "what gap --json prints", None)
    return GapFile(record, Gap(modules, loads, bool(estimated)))


def _module(one: Record) -> ModuleGap:
    from gora_serve.deploy.gap import NORMS, ModuleGap

    norms = {name: one.number(name) for name in NORMS}
    for name in ("weight", "update"):
        if norms[name] is None:
            raise one.malformed(name, "a number", None)
    ranks = {name: one.whole(name) or 0 for name in ("rank", "plain_rank", "served_rank")}
    return ModuleGap(shape=(0, 0), **norms, **ranks)  # type: ignore[arg-type]


def gap_figure(one: GapFile, name: str) -> Figure | None:
    """The errors of all modules together, by cause, as shares of the update, on a logarithmic scale."""
    shares = one.gap.shares()
    known = {key: shares[key] for key in NAMES if shares[key]}
    if not known:
        return None
    values = [value for value in known.values() if value is not None]
    x = scale_of([*values, min(values) / 3, 1.0], 6.0, WIDTH - 70, log=True)
    parts = []
    for row, (key, value) in enumerate(zip(known, values, strict=True)):
        y = 8 + row * 42.0
        parts.append(words(NAMES[key], 6, y + 9))
        parts.append(
            box(
                6,
                y + 14,
                x(value) - 6,
                14,
                "bar s1" if key == "unconverted_of_update" else "bar s0",
                f"{NAMES[key]}: {short(value)}",
            )
        )
        parts.append(words(_share(value), x(value) + 6, y + 26))
    bottom = 8 + 42.0 * len(values)
    parts.append(
        tag(
            "line",
            tag("title", "as large as the update"),
            x1=f"{x(1.0):.1f}",
            x2=f"{x(1.0):.1f}",
            y1="4",
            y2=f"{bottom:g}",
            class_="level",
        )
    )
    parts.append(words("as large as the update", x(1.0), bottom + 12, "end" if x(1.0) > WIDTH / 2 else "start", "name"))
    says = "Error of the whole update as a share of it, |error| / |dW|, on a logarithmic scale. " + " ".join(
        f"{NAMES[key].capitalize()}: {_share(value)}." for key, value in known.items()
    )
    rows = [[NAMES[key], exact(value, _share(value))] for key, value in known.items()]
    table = Table(f"Errors by cause, {one.adapter}", ("cause", "share of the update"), rows)
    return Figure(name, f"Gap: {one.adapter}", says, (WIDTH, bottom + 20), join(parts), table)


def _share(value: float | None) -> str:
    if value is None or value == 0 or 1e-4 <= value < 10:
        return percent(value, 2)
    return f"{short(value, 3)} times" if value >= 10 else f"{value:.1e}"


def verdict(one: GapFile) -> str:
    """What the file answers, in a sentence."""
    if not one.gap.loads:
        return "No engine loads this adapter as LoRA."
    share = one.gap.shares()["unconverted_of_update"]
    if share == 0:
        return "Right as it is: plain LoRA on this base."
    if share is None:
        return "Served as it is, off, where the update is zero."
    return f"Served as it is, the error is {_share(share)} {'the' if share >= 10 else 'of the'} update."


def gap_tables(one: GapFile) -> Html:
    """By kind of module, what the models answer, and what tasks take to deploy, where the file has them."""
    tables = [_kinds_table(one)]
    outcomes = list(one.record.part("comparison").parts("outcomes"))
    if outcomes:
        rows = [
            [name, *(exact(it.number(key), show(it.number(key))) for key, show in _OUTCOMES.values())]
            for name, it in outcomes
        ]
        comparison = one.record.part("comparison")
        data = comparison.part("data").text("name") or "the data"
        caption = f"What the models answer on {comparison.whole('rows')} rows of {data}"
        tables.append(Table(caption, ("model", *_OUTCOMES), rows))
    costs = one.record.items("deployment")
    if costs:
        rows = [
            [it.text("name") or "", *(_cell(it.whole(key) or None, show) for key, show in _COSTS.values())]
            for it in costs
        ]
        tables.append(Table(f"To deploy {costs[0].whole('tasks')} tasks", ("", *_COSTS), rows))
    return join(table.html() for table in tables)


_OUTCOMES = {
    "loss": ("loss", short), "KL from as trained": ("kl", short), "same top token": ("agreement", percent),
}  # fmt: skip
_COSTS = {
    "on disk": ("stored", size), "largest rank": ("max_rank", str), "max_lora_rank": ("bucket", str),
    "in memory": ("in_memory", size),
}  # fmt: skip


def _cell(value: int | None, show: object) -> Html:
    assert callable(show)
    return exact(value, "" if value is None else show(value))


def _kinds_table(one: GapFile) -> Table:
    from gora_serve.deploy.gap import SHARES

    total = one.gap.shares()
    columns = [name for name in SHARES if total[name] is not None and name.endswith("_of_update")]
    rows: list[Sequence[object]] = []
    for kind, paths in by_kind(one.gap.modules).items():
        shares = one.gap.shares(paths)
        rows.append([kind, str(len(paths)), *(exact(shares[name], _share(shares[name])) for name in columns)])
    foot = ["all", str(len(one.gap.modules)), *(exact(total[name], _share(total[name])) for name in columns)]
    heads = ("kind of module", "modules", *(NAMES.get(name, "4-bit base") for name in columns))
    return Table("Errors as shares of the update, by kind of module", heads, rows, foot=foot)
