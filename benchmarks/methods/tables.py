"""The tables of the rows that are there: results/methods.json, and Markdown on standard output.

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
from methods.run import best_rate, rows
from methods.tasks import TASKS

Rows = Sequence[dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "seeds": len(values),
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


def markdown(value: dict[str, Any]) -> str:
    tasks = [task for task in TASKS if any(task in one["tasks"] for one in value.values())]
    lines = ["| method | parameters | " + " | ".join(tasks) + " | mean | loss, mean |"]
    lines.append("| --- " * (len(tasks) + 4) + "|")
    for name, one in value.items():
        cells = [one["tasks"].get(task) for task in tasks]
        scores = [f"{cell['score']['mean']:.3f}" if cell else "" for cell in cells]
        full = [cell for cell in cells if cell]
        means = [statistics.fmean(cell[what]["mean"] for cell in full) for what in ("score", "eval_loss")]
        shown = [f"{mean:.3f}" if len(full) == len(tasks) else "" for mean in means]
        lines.append(f"| {name} | {one['parameters'] / 1e6:.2f} M | " + " | ".join([*scores, *shown]) + " |")
    return "\n".join(lines)


def main() -> None:
    value = tables(rows())
    devices = sorted({row["device"] for row in rows()})
    write("methods", facts("python benchmarks/methods/tables.py") | {"devices": devices, "methods": value})
    print(markdown(value))


if __name__ == "__main__":
    main()
