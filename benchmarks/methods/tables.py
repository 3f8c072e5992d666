"""The tables of the rows that are there: results/methods.json, and Markdown in docs/methods.md.

python benchmarks/methods/tables.py
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import facts, write

from methods.methods import methods
from methods.run import STEPS, best_rate, rows
from methods.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN = "<!-- made by benchmarks/methods/tables.py -->"

Rows = Sequence[dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "rows": len(values),
    }


def paired(found: Rows, method: str, against: str, what: str) -> dict[str, Any] | None:
    """Return the mean difference over the seeds and tasks that both have, and its standard error over tasks."""
    by = {(row["method"], row["task"], row["seed"]): row[what] for row in found}
    differences: dict[str, list[float]] = {}
    for (name, task, seed), value in by.items():
        if name == method and (against, task, seed) in by:
            differences.setdefault(task, []).append(value - by[against, task, seed])
    if not differences:
        return None
    means = {task: statistics.fmean(values) for task, values in differences.items()}
    error = statistics.stdev(means.values()) / math.sqrt(len(means)) if len(means) > 1 else None
    better = sum(value > 0 if what == "score" else value < 0 for value in means.values())
    return {
        "mean": round(statistics.fmean(means.values()), 4), "error": round(error, 4) if error is not None else None,
        "better on": better, "of tasks": len(means), "by task": {task: round(one, 4) for task, one in means.items()},
    }  # fmt: skip


def tables(found: Rows) -> dict[str, Any]:
    test = [row for row in found if row["split"] == "test" and row["lr"] == rate_of(row, found)]
    names = list(dict.fromkeys(row["method"] for row in test))
    value: dict[str, Any] = {}
    for name in names:
        own = [row for row in test if row["method"] == name]
        by_task = {task: [row for row in own if row["task"] == task] for task in TASKS}
        reference = "lora-32" if name.endswith("-32") else "lora"
        value[name] = {
            "tasks": {
                task: {what: spread([row[what] for row in some]) for what in ("score", "eval_loss")}
                | {"lr": some[0]["lr"]}
                for task, some in by_task.items() if some
            },
            "parameters": own[0]["parameters"],
            "seconds": spread([row["seconds"]["prepare"] + row["seconds"]["train"] for row in own]),
            "seconds to prepare": spread([row["seconds"]["prepare"] for row in own]),
            "peak_MB": round(max(row["peak_bytes"] for row in own) / 1e6),
            f"score against {reference}": paired(test, name, reference, "score"),
            f"loss against {reference}": paired(test, name, reference, "eval_loss"),
            **served(own),
        }  # fmt: skip
    return value


def rate_of(row: dict[str, Any], found: Rows) -> float | None:
    """Return the learning rate that the sweep gives now; a row of an earlier, smaller sweep may have another."""
    return best_rate(list(found), methods(row["steps"])[row["method"]], row["task"], row["steps"])


def served(own: Rows) -> dict[str, Any]:
    some = [row for row in own if isinstance(row["served"], dict)]
    if not some:
        return {}
    kinds = ("unconverted", "converted")
    return {
        "served": {"as trained": spread([row["score"] for row in some])}
        | {kind: spread([row["served"][kind] for row in some]) for kind in kinds}
    }


def swept(found: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Return the losses on validation rows, by task, method and learning rate."""
    losses: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(found, key=lambda row: row["lr"]):
        if row["split"] == "valid":
            of_task = losses.setdefault(row["task"], {})
            of_task.setdefault(row["method"], {})[f"{row['lr']:g}"] = round(row["eval_loss"], 4)
    return losses


def sweep_markdown(losses: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table a task: methods by their lowest loss, with all rates that were tried, the lowest in bold.

    A method that lacks some of its rates comes after those that have all, and is marked.
    """
    every = methods(STEPS)

    def lacks(name: str, tried: dict[str, float]) -> bool:
        return not {f"{lr:g}" for lr in every[name].rates} <= set(tried)

    parts = []
    for task, of_task in losses.items():
        lines = [f"**{task}**\n", "| method | lowest loss | tried: rate, loss |", "| --- | --- | --- |"]
        for name, tried in sorted(of_task.items(), key=lambda one: (lacks(*one), min(one[1].values()))):
            least = min(tried.values())
            shown = [f"**{lr}** {loss:.4f}" if loss == least else f"{lr} {loss:.4f}" for lr, loss in tried.items()]
            mark = " (not whole)" if lacks(name, tried) else ""
            lines.append(f"| {name}{mark} | {least:.4f} | {', '.join(shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def test_markdown(value: dict[str, Any]) -> str:
    """Methods by tasks, each cell: score ± deviation, loss (how many seeds; the learning rate)."""
    tasks = [task for task in TASKS if any(task in one["tasks"] for one in value.values())]
    lines = ["| method | parameters | " + " | ".join(tasks) + " |", "| --- " * (len(tasks) + 2) + "|"]
    for name, one in value.items():
        cells = [told(one["tasks"].get(task)) for task in tasks]
        lines.append(f"| {name} | {one['parameters'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    score, loss = cell["score"], cell["eval_loss"]
    spread_of = f" ± {score['deviation']:.3f}" if score["deviation"] is not None else ""
    return f"{score['mean']:.3f}{spread_of}, {loss['mean']:.4f} ({score['rows']}; {cell['lr']:g})"


def main() -> None:
    found = [row for row in rows() if row["steps"] == STEPS]
    value, losses = tables(found), swept(found)
    devices = sorted({row["device"] for row in found})
    head = facts("python benchmarks/methods/tables.py")
    write("methods", head | {"rows": len(found), "devices": devices, "sweep": losses, "methods": value})
    before, mark, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert mark, f"{PAGE} has no mark"
    made = [f"{len(found)} rows, made on: {'; '.join(devices)}.", "### Learning rates", sweep_markdown(losses)]
    cells = "Each cell: score ± deviation over seeds, loss (how many seeds; learning rate). Other rates are left out."
    made += ["### Test rows", cells, test_markdown(value)]
    PAGE.write_text(before + mark + "\n\n" + "\n\n".join(made) + "\n", encoding="utf-8")
    print("\n\n".join(made))


if __name__ == "__main__":
    main()
