"""Figures of losses over steps (the paper's figure 2) and of the search for gamma."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gora_serve.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Frame, legend, scale_of
from gora_serve.report.markup import Figure, Html, Table, exact, join
from gora_serve.report.numbers import Point, short, smooth, spread, thin
from gora_serve.report.record import Record
from gora_serve.report.runs import Run

MOST_POINTS = 240  # of a drawn line
MOST_ROWS = 25  # of a figure's table
SIZE = (WIDTH, HEIGHT)
NOT_FINITE = "not finite"


def training_figure(runs: Sequence[Run]) -> Figure | None:
    """Training loss over steps; where there are many steps, a moving mean over the pale raw line."""
    drawn = [(index, run) for index, run in enumerate(runs) if run.losses]
    if not drawn:
        return None
    parts = []
    frame = _frame([run.losses for _, run in drawn])
    for index, run in drawn:
        points = thin(run.losses, MOST_POINTS)
        window = len(points) // 12
        if window >= 3:
            parts += [frame.line(points, index, "raw"), frame.line(smooth(points, window), index)]
        else:
            parts.append(frame.line(points, index))
            parts.append(frame.marks(_labelled(run, points), index, 2.6))
        parts.append(_missing(frame, run.losses, index, run.label))
    smoothed = " Pale: as measured; strong: moving mean." if any(len(run.losses) >= 36 for _, run in drawn) else ""
    says = f"Mean loss per token of each optimizer step.{smoothed} {_ends(drawn, lambda run: run.losses)}"
    drawing = join([frame.axes("step", "training loss"), *parts])
    table = _table("Training loss by step", drawn, lambda run: run.losses)
    return Figure("training-loss", "Training loss", says, SIZE, drawing, table, _legend(drawn))


def evaluation_figure(runs: Sequence[Run]) -> Figure | None:
    """Loss on the evaluation rows over steps, and the base's own as a level."""
    drawn = [(index, run) for index, run in enumerate(runs) if run.evaluations or run.base_loss is not None]
    if not drawn:
        return None
    bases = [[(0.0, run.base_loss)] for _, run in drawn]
    frame = _frame([*(run.evaluations for _, run in drawn), *bases])
    parts = []
    for index, run in drawn:
        if run.base_loss is not None:
            parts.append(frame.level(run.base_loss, index, f"{run.label}: the base itself, {short(run.base_loss)}"))
        parts += [frame.line(run.evaluations, index), frame.marks(_labelled(run, run.evaluations), index)]
        parts.append(_missing(frame, run.evaluations, index, run.label))
    says = f"Mean loss per token on rows kept from training. Dotted: the base itself. {_ends(drawn, _evaluations)}"
    drawing = join([frame.axes("step", "evaluation loss"), *parts])
    table = _table("Evaluation loss by step", drawn, _evaluations, first=("base", _base_loss))
    return Figure("evaluation-loss", "Evaluation loss", says, SIZE, drawing, table, _legend(drawn))


def gamma_figure(run: Run, index: int, name: str) -> Figure | None:
    """The loss at every gamma that the search tried, over log gamma."""
    if run.gamma is None:
        return None
    tried = [(one.number("gamma"), _loss(one)) for one in run.gamma.items("tried")]
    chosen, base = run.gamma.number("gamma"), run.gamma.number("base_loss")
    positive = sorted((gamma, loss) for gamma, loss in tried if gamma is not None and gamma > 0 and loss is not None)
    if not positive or base is None or chosen is None:
        return None
    x = scale_of([gamma for gamma, _ in positive], LEFT, WIDTH - RIGHT, log=True)
    y = scale_of([base, *_capped([loss for _, loss in positive], base)], HEIGHT - BOTTOM, TOP)
    frame = Frame(x, y, counts=False)
    shown = [(gamma, min(loss, y.high)) for gamma, loss in positive]
    marks = [
        (gamma, at, f"gamma {short(gamma)}: loss {short(loss)}")
        for (gamma, at), (_, loss) in zip(shown, positive, strict=True)
    ]
    parts = [frame.axes("gamma, logarithmic", "loss"), frame.level(base, index, f"gamma 0: loss {short(base)}")]
    parts += [frame.line(shown, index), frame.marks(marks, index)]
    parts += [frame.marks([one for one in marks if one[0] == chosen], index, 6.0)]
    loss = run.gamma.number("loss")
    says = (
        f"Loss on {run.gamma.whole('rows') or 0} rows that the probe did not see. Dotted: gamma 0, loss {short(base)}. "
        f"Taken: gamma {short(chosen)}, loss {short(loss)}."
    )
    rows = [(exact(gamma, short(gamma)), exact(value, short(value)) if value is not None else NOT_FINITE)
            for gamma, value in sorted(tried, key=lambda one: one[0] or 0.0)]  # fmt: skip
    table = Table(f"Values of gamma tried, {run.label}", ("gamma", "loss"), rows)
    return Figure(name, f"Search for gamma: {run.label}", says, SIZE, join(parts), table)


def _loss(one: Record) -> float | None:
    """Return the loss of a gamma that was tried; the file writes an infinite one as text."""
    return None if isinstance(one.value.get("loss"), str) else one.number("loss")


def _capped(losses: list[float], base: float) -> list[float]:
    """Keep a diverging gamma from flattening the rest: nothing above the base by more than the range below it."""
    highest = base + 1.5 * max(base - min(losses), 0.05 * abs(base))
    return [min(loss, highest) for loss in losses]


def _frame(series: Sequence[Sequence[Point]]) -> Frame:
    xs = [x for points in series for x, _ in points]
    ys = [y for points in series for _, y in points if y is not None]
    x = scale_of([0.0, *xs], LEFT, WIDTH - RIGHT, zero=True)
    return Frame(x, scale_of(ys or [0.0, 1.0], HEIGHT - BOTTOM, TOP))


def _labelled(run: Run, points: Sequence[Point]) -> list[tuple[float, float, str]]:
    return [(x, y, f"{run.label}, step {x:g}: {short(y)}") for x, y in points if y is not None]


def _missing(frame: Frame, points: Sequence[Point], index: int, label: str) -> Html:
    lost = [x for x, y in points if y is None]
    return join(
        frame.missing(lost[at], index, f"{label}, step {lost[at]:g}: {NOT_FINITE}") for at in spread(len(lost), 20)
    )


def _legend(drawn: Sequence[tuple[int, Run]]) -> Html:
    return legend([(index, run.label) for index, run in drawn])


def _evaluations(run: Run) -> Sequence[Point]:
    return run.evaluations


def _base_loss(run: Run) -> float | None:
    return run.base_loss


def _ends(drawn: Sequence[tuple[int, Run]], points: Callable[[Run], Sequence[Point]]) -> str:
    """Say where every line begins and ends."""
    said = []
    for _, run in drawn:
        found = points(run)
        if not found:
            continue
        (first, start), (last, end) = found[0], found[-1]
        where = (
            f"at step {last:g}"
            if first == last
            else f"from {_or_not(start)} at step {first:g} to {_or_not(end)} at step {last:g}"
        )
        said.append(f"{run.label}: {_or_not(end) + ' ' if first == last else ''}{where}.")
    return " ".join(said)


def _or_not(value: float | None) -> str:
    return NOT_FINITE if value is None else short(value)


def _table(
    caption: str,
    drawn: Sequence[tuple[int, Run]],
    points: Callable[[Run], Sequence[Point]],
    first: tuple[str, Callable[[Run], float | None]] | None = None,
) -> Table:
    """The numbers of a figure over steps: all of them, or as many steps as a page holds, evenly spread."""
    by_run = [dict(points(run)) for _, run in drawn]
    steps = sorted({step for found in by_run for step in found})
    chosen = [steps[at] for at in spread(len(steps), MOST_ROWS)]
    if len(chosen) < len(steps):
        caption = f"{caption}, {len(chosen)} of {len(steps)} steps"
    rows: list[list[object]] = []
    if first is not None:
        rows.append([first[0], *(exact(value, short(value)) for value in (first[1](run) for _, run in drawn))])
    for step in chosen:
        rows.append([f"{step:g}", *(_cell(found, step) for found in by_run)])
    return Table(caption, ("step", *(run.label for _, run in drawn)), rows)


def _cell(found: dict[float, float | None], step: float) -> object:
    value = found.get(step)
    return NOT_FINITE if step in found and value is None else exact(value, short(value))
