"""Figures by module: ranks as a heat map (figure 3a), the size of updates against rank (3b, 3c), parameters by kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gora_serve.adapter.names import kinds_and_layers
from gora_serve.errors import printable
from gora_serve.gora.ranks import RankPlan
from gora_serve.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    box,
    color_of,
    legend,
    scale_of,
    words,
)
from gora_serve.report.markup import Figure, Html, Table, exact, join
from gora_serve.report.numbers import percent, rank_correlation, short
from gora_serve.report.runs import Run

SHADES = 7
LABELS = 84.0  # units left of a map or of bars, for the names of kinds
LONGEST = 12  # characters of such a name


@dataclass(frozen=True)
class Grid:
    """Modules by kind and layer. cells: (kind, layer) -> module path."""

    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    cells: Mapping[tuple[str, str], str]

    @property
    def names(self) -> dict[str, str]:
        """What each kind is called in a drawing: the shortest end of its path that no other kind shares."""
        return dict(zip(self.kinds, shortest(self.kinds), strict=True))

    def paths_of(self, kind: str) -> list[str]:
        return [self.cells[kind, layer] for layer in self.layers if (kind, layer) in self.cells]


def grid_of(paths: Sequence[str]) -> Grid:
    """Sort module paths into kinds and layers. Two paths in one cell (nested numbers) become kinds of their own."""
    named = kinds_and_layers(paths)
    cells: dict[tuple[str, str], str] = {}
    for path in paths:
        place = named[path]
        cells[place if place not in cells else (path, place[1])] = path
    kinds = dict.fromkeys(kind for kind, _ in cells)
    layers = sorted(
        {layer for _, layer in cells}, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    return Grid(tuple(kinds), tuple(layers), cells)


def shortest(names: Sequence[str]) -> list[str]:
    depth = 1
    while len({_end(name, depth) for name in names}) < len(set(names)):
        depth += 1
    return [_end(name, depth) for name in names]


def _end(name: str, depth: int) -> str:
    return ".".join(name.split(".")[-depth:])


def clipped(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def ranks_figure(run: Run, name: str) -> Figure | None:
    """The paper's figure 3a: layers from left to right, one line for each kind of module, the darker the higher."""
    ranks = run.module_ranks
    if not ranks or has_one_rank(run):
        return None
    grid = grid_of(list(ranks))
    lowest, highest = min(filter(None, ranks.values()), default=1), max(ranks.values())
    width = (WIDTH - LABELS - 2) / len(grid.layers)
    height = 17.0
    parts = []
    for row, kind in enumerate(grid.kinds):
        y = 8 + row * (height + 2)
        parts.append(words(clipped(grid.names[kind]), LABELS - 6, y + 12.5, "end", None, kind))
        for column, layer in enumerate(grid.layers):
            path = grid.cells.get((kind, layer))
            if path is not None:
                shade = shade_of(ranks[path], lowest, highest)
                gap = min(1.0, width / 8)
                says = f"{path}: rank {ranks[path]}"
                parts.append(box(LABELS + column * width, y, width - gap, height, shade, says))
    bottom = 8 + len(grid.kinds) * (height + 2)
    parts += _layer_names(grid, width, bottom + 13)
    parts += _shades(lowest, highest, bottom + 36)
    table = _ranks_table(run, grid)
    return Figure(name, f"Ranks: {run.label}", _ranks_say(run, grid), (WIDTH, bottom + 52), join(parts), table)


def shade_of(rank: int, lowest: int, highest: int) -> str:
    """Return the class of a rank: h0 for none, h1 to h7 evenly over log rank, as ranks are spread."""
    if rank == 0:
        return "h0"
    if highest == lowest:
        return f"h{(SHADES + 1) // 2}"
    share = math.log(rank / lowest) / math.log(highest / lowest)
    return f"h{1 + min(SHADES - 1, int(share * SHADES))}"


def _layer_names(grid: Grid, width: float, y: float) -> list[Html]:
    every = max(1, math.ceil(26 / width))
    every = next(step for step in (1, 2, 5, 10, 20, 50, every) if step >= every)
    found = [
        words(clipped(layer), LABELS + (column + 0.5) * width, y, "middle")
        for column, layer in enumerate(grid.layers)
        if column % every == 0
    ]
    return [*found, words("layer", LABELS - 6, y, "end", "name")]


def _shades(lowest: int, highest: int, y: float) -> list[Html]:
    """Draw the scale of shades."""
    width = 22.0
    parts = [words("rank", LABELS - 6, y + 10, "end", "name")]
    if highest == lowest:
        shade = shade_of(highest, lowest, highest)
        return [
            *parts,
            box(LABELS, y, width, 12, shade, f"rank {highest}"),
            words(str(highest), LABELS + width + 6, y + 10),
        ]
    parts.append(words(str(lowest), LABELS, y + 10))
    start = LABELS + 8 * len(str(lowest)) + 4
    parts += [box(start + index * width, y, width - 1, 12, f"h{index + 1}", "") for index in range(SHADES)]
    return [*parts, words(str(highest), start + SHADES * width + 5, y + 10)]


def _ranks_say(run: Run, grid: Grid) -> str:
    ranks = run.module_ranks
    means = {kind: _mean([ranks[path] for path in grid.paths_of(kind)]) for kind in grid.kinds}
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    count = f"{len(ranks)} modules, rank {min(ranks.values())} to {max(ranks.values())}"
    if means[most] == means[least]:
        return f"{count}. Every kind of module has the same mean rank, {means[most]:.3g}."
    return (
        f"{count}. On average {grid.names[most]} has the highest rank, {means[most]:.3g}, "
        f"and {grid.names[least]} the lowest, {means[least]:.3g}."
    )


def _ranks_table(run: Run, grid: Grid) -> Table:
    ranks = run.module_ranks
    rows = []
    for layer in grid.layers:
        paths = [grid.cells.get((kind, layer)) for kind in grid.kinds]
        rows.append([layer, *("" if path is None else exact(ranks[path], str(ranks[path])) for path in paths)])
    names = [grid.names[kind] for kind in grid.kinds]
    return Table(f"Ranks by layer and kind of module, {run.label}", ("layer", *names), rows)


def has_one_rank(run: Run) -> bool:
    """Return whether every module has the same rank, so that there is no map to draw."""
    return len(set(run.module_ranks.values())) == 1


@dataclass(frozen=True)
class Sized:
    """A module of a scatter: its rank, the value drawn over it, and the norms that the value is made of."""

    rank: int
    value: float
    norms: tuple[float, ...]


def updates_figure(run: Run, name: str) -> Figure | None:
    """The size of each module's update against its rank: the root mean square over the entries of dW.

    After the paper's figures 3b and 3c, without the base's weights. |dW| alone grows with the size of the module.
    """
    found = {}
    for path, rank in run.module_ranks.items():
        if rank and path in run.updates:
            found[path] = Sized(rank, run.updates[path] / math.sqrt(math.prod(run.shapes[path])), (run.updates[path],))
    if not found or has_one_rank(run):
        return None
    says = "Every mark is a module: the root mean square of the entries of its update after training. "
    heads = ("|dW|", "rms of dW")
    return _scatter(found, name, f"Size of the update against rank: {run.label}", says, "rms of dW", heads)


def against_lora(run: Run, lora: Run, name: str) -> Figure | None:
    """The size of each module's update, as a multiple of the one that LoRA gave the same module, against rank."""
    found = {}
    for path, rank in run.module_ranks.items():
        other = lora.updates.get(path)
        if rank and other and path in run.updates:
            found[path] = Sized(rank, run.updates[path] / other, (run.updates[path], other))
    if not found:
        return None
    says = f"Every mark is a module: |dW| of {run.label} over |dW| of {lora.label}. "
    heads = (f"|dW| of {run.label}", f"|dW| of {lora.label}", "ratio")
    return _scatter(found, name, f"Update beside LoRA's: {run.label} / {lora.label}", says, "ratio of |dW|", heads)


def _scatter(
    found: Mapping[str, Sized], name: str, title: str, says: str, y_name: str, heads: tuple[str, ...]
) -> Figure:
    grid = grid_of(list(found))
    ranks, values = [float(one.rank) for one in found.values()], [one.value for one in found.values()]
    log = min(values) > 0 and max(values) > 20 * min(values)
    x = scale_of(ranks, LEFT, WIDTH - RIGHT, zero=True)
    frame = Frame(x, scale_of(values, HEIGHT - BOTTOM, TOP, log=log, zero=not log))
    parts = [frame.axes("rank", f"{y_name}{', logarithmic' if log else ''}")]
    for index, kind in enumerate(grid.kinds):
        chosen = [(path, found[path]) for path in grid.paths_of(kind)]
        marks = [(float(one.rank), one.value, f"{path}: rank {one.rank}, {short(one.value)}") for path, one in chosen]
        parts.append(frame.marks(marks, index, 3.2))
    rho = rank_correlation(ranks, values)
    says += f"Spearman's correlation with rank: {rho:.2f}." if rho is not None else "There is no correlation to tell."
    rows = [
        [path, exact(one.rank, str(one.rank)), *(exact(value, short(value)) for value in (*one.norms, one.value))]
        for path, one in found.items()
    ]
    names = legend([(index, grid.names[kind]) for index, kind in enumerate(grid.kinds)], line=False)
    table = Table(title, ("module", "rank", *heads), rows)
    return Figure(name, title, says, (WIDTH, HEIGHT), join(parts), table, names)


def parameters_figure(run: Run, index: int, name: str) -> Figure | None:
    """Parameters of each kind of module, beside what LoRA would give it at the reference rank."""
    counts = kind_counts(run)
    if not counts:
        return None
    names = dict(zip(counts, shortest(list(counts)), strict=True))
    reference = run.ranks.whole("rank") if run.ranks else None
    x = scale_of(
        [0.0, *(float(max(one.parameters, one.lora)) for one in counts.values())], LABELS, WIDTH - 62, zero=True
    )
    parts = []
    for row, (kind, one) in enumerate(counts.items()):
        y = 6 + row * 32.0
        parts.append(words(clipped(names[kind]), LABELS - 6, y + 16, "end", None, kind))
        parts.append(
            box(LABELS, y, x(one.parameters) - LABELS, 12, f"bar {color_of(index)}", f"{kind}: {one.parameters:,}")
        )
        parts.append(box(LABELS, y + 13, x(one.lora) - LABELS, 8, "bar pale", f"{kind}, LoRA: {one.lora:,}"))
        longest = max(x(one.parameters), x(one.lora))
        parts.append(words(percent(one.parameters / one.lora if one.lora else None, 0), longest + 5, y + 15))
    total, lora = sum(one.parameters for one in counts.values()), sum(one.lora for one in counts.values())
    says = (
        f"{total:,} trained parameters, {percent(total / lora if lora else None)} of LoRA's {lora:,} at rank "
        f"{reference}. Upper bar: this run; lower, pale: LoRA; the number: their ratio."
    )
    rows: list[Sequence[object]] = [one.row(kind) for kind, one in counts.items()]
    foot = Count(sum(one.modules for one in counts.values()), total, lora, "").row("all")
    heads = ("kind of module", "modules", "ranks", "parameters", "LoRA's", "share")
    table = Table(f"Parameters by kind of module, {run.label}", heads, rows, foot=foot)
    size = (WIDTH, 6 + 32.0 * len(counts))
    return Figure(name, f"Parameters: {run.label}", says, size, join(parts), table)


@dataclass(frozen=True)
class Count:
    """Modules of one kind: how many, their parameters, those of LoRA at the reference rank, and their ranks as text."""

    modules: int
    parameters: int
    lora: int
    ranks: str

    def row(self, kind: str) -> list[object]:
        share = self.parameters / self.lora if self.lora else None
        return [kind, str(self.modules), self.ranks, exact(self.parameters, f"{self.parameters:,}"),
                exact(self.lora, f"{self.lora:,}"), exact(share, percent(share))]  # fmt: skip


def kind_counts(run: Run) -> dict[str, Count]:
    """Count parameters by kind of module: rank * (out + in) each. Empty where ranks or shapes are not known."""
    ranks, reference = run.module_ranks, run.ranks.whole("rank") if run.ranks else None
    known = [path for path in ranks if path in run.shapes]
    if reference is None or not known:
        return {}
    grid = grid_of(known)
    found = {}
    for kind in grid.kinds:
        shapes = {path: run.shapes[path] for path in grid.paths_of(kind)}
        chosen = {path: ranks[path] for path in shapes}
        plan = RankPlan("", reference, min(chosen.values()), max(chosen.values()), chosen, shapes)
        span = str(plan.rank_max) if plan.rank_min == plan.rank_max else f"{plan.rank_min} to {plan.rank_max}"
        found[kind] = Count(len(shapes), plan.parameters, plan.lora_parameters, span)
    return found


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
