"""The tables of the rows that are there: results/methods.json, and Markdown in docs/methods.md.

python benchmarks/methods/tables.py
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import RESULTS, facts, write

from methods.methods import methods
from methods.run import STEPS, all_rows, best_rate, key, on_cpu, rows, tried
from methods.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
DEPLOYED = (1, 10, 100)  # tasks
BEGIN = "<!-- made by benchmarks/methods/tables.py -->"

Rows = Sequence[dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "rows": len(values),
    }


def paired(found: Rows, method: str, against: str, what: str) -> dict[str, Any] | None:
    """Return the mean difference over the seeds and tasks that both have, and its standard error over tasks.

    Rows of a CPU are compared with those of a CPU alone.
    """
    by = {(row["method"], row["task"], row["seed"], on_cpu(row)): row[what] for row in found}
    differences: dict[str, list[float]] = {}
    for (name, *rest), value in by.items():
        if name == method and (against, *rest) in by:
            differences.setdefault(rest[0], []).append(value - by[against, *rest])
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
                | {"lr": some[0]["lr"], "swept": swept_whole(name, task, found)}
                for task, some in by_task.items() if some
            },
            "parameters": own[0]["parameters"],
            f"score against {reference}": paired(test, name, reference, "score"),
            f"loss against {reference}": paired(test, name, reference, "eval_loss"),
        }  # fmt: skip
    return value


def swept_whole(name: str, task: str, found: Rows) -> bool:
    """Whether the task has a whole sweep of its own: else its rate is that of others."""
    method = methods(STEPS)[name]
    return set(tried(list(found), method, task, STEPS)) >= set(method.rates)


def rate_of(row: dict[str, Any], found: Rows) -> float | None:
    """Return the learning rate that the sweep gives now; a row of an earlier, smaller sweep may have another."""
    return best_rate(list(found), methods(row["steps"])[row["method"]], row["task"], row["steps"])


def served(found: Rows) -> list[dict[str, Any]]:
    """The scores of rows that were served too, at whatever learning rate: the gap is of the method."""
    some = [row for row in found if isinstance(row["served"], dict)]
    return [
        {"method": row["method"], "task": row["task"], "lr": row["lr"], "as trained": row["score"]}
        | {kind: row["served"][kind] for kind in ("unconverted", "converted")}
        for row in sorted(some, key=lambda row: (row["method"], list(TASKS).index(row["task"]), row["lr"]))
    ]


def deployed(found: Rows) -> dict[str, dict[str, dict[int, int]]]:
    """Megabytes to deploy 1, 10 and 100 tasks, by method: as trained, and all on one base.

    As trained, a method that edits the base needs a base for each task.
    """
    value = {}
    for row in found:
        one = row["served"]
        if isinstance(one, dict) and "base_bytes" in one:
            own_base = methods(row["steps"])[row["method"]].initial
            base, trained = one["base_bytes"], one["trained_bytes"]
            plain = one["converted_bytes"] if own_base else trained
            value[row["method"]] = {
                "as trained": {n: round(((n if own_base else 1) * base + n * trained) / 1e6) for n in DEPLOYED},
                "on one base": {n: round((base + n * plain) / 1e6) for n in DEPLOYED},
            }
    return value


def swept(found: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Return the losses on validation rows, by task, method and learning rate."""
    losses: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(found, key=lambda row: row["lr"]):
        if row["split"] == "valid":
            of_task = losses.setdefault(row["task"], {})
            loss = row["eval_loss"]
            of_task.setdefault(row["method"], {})[f"{row['lr']:g}"] = (
                round(loss, 4) if math.isfinite(loss) else math.inf
            )
    return losses


def twice(every: Rows) -> list[dict[str, Any]]:
    """Return the losses of rows that were made on a CPU and on an accelerator: what the arithmetic alone changes."""
    faster = {key(row): row for row in every if not on_cpu(row)}
    return [
        {name: row[name] for name in ("method", "task", "seed", "lr", "split")}
        | {"accelerator": round(faster[key(row)]["eval_loss"], 4), "CPU": round(row["eval_loss"], 4)}
        for row in every if on_cpu(row) and key(row) in faster
    ]  # fmt: skip


def twice_markdown(both: Sequence[dict[str, Any]]) -> str:
    lines = ["| method | task | rate | loss, accelerator | loss, CPU |", "| --- " * 5 + "|"]
    for row in both:
        lines.append(f"| {row['method']} | {row['task']} | {row['lr']:g} | {row['accelerator']} | {row['CPU']} |")
    return "\n".join(lines)


def sweep_markdown(losses: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table a task: methods by their lowest loss, with all rates that were tried, the lowest in bold.

    A method that lacks some of its rates comes after those that have all, and is marked.
    """
    every = methods(STEPS)

    def lacks(name: str, at: dict[str, float]) -> bool:
        return not {f"{lr:g}" for lr in every[name].rates} <= set(at)

    parts = []
    for task, of_task in losses.items():
        lines = [f"**{task}**\n", "| method | lowest loss | tried: rate, loss |", "| --- | --- | --- |"]
        for name, at in sorted(of_task.items(), key=lambda one: (lacks(*one), min(one[1].values()))):
            least = min(at.values())
            shown = [f"**{lr}** {loss:.4f}" if loss == least else f"{lr} {loss:.4f}" for lr, loss in at.items()]
            mark = " (not whole)" if lacks(name, at) else ""
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
    mark = "" if cell["swept"] else "*"
    spread_of = f" ± {score['deviation']:.3f}" if score["deviation"] is not None else ""
    return f"{score['mean']:.3f}{spread_of}, {loss['mean']:.4f} ({score['rows']}; {cell['lr']:g}{mark})"


def served_markdown(rows: Rows) -> str:
    lines = ["| method | task | rate | as trained | served unconverted | served converted |", "| --- " * 6 + "|"]
    for row in rows:
        scores = " | ".join(f"{row[kind]:.3f}" for kind in ("as trained", "unconverted", "converted"))
        lines.append(f"| {row['method']} | {row['task']} | {row['lr']:g} | {scores} |")
    return "\n".join(lines)


def deployed_markdown(value: dict[str, dict[str, dict[int, int]]]) -> str:
    counts = ", ".join(map(str, DEPLOYED))
    lines = [f"| method | as trained, MB of {counts} tasks | all on one base |", "| --- " * 3 + "|"]
    for name, one in value.items():
        lines.append(f"| {name} | " + " | ".join(", ".join(map(str, size.values())) for size in one.values()) + " |")
    return "\n".join(lines)


def cost_markdown(cost: dict[str, Any]) -> str:
    """One table a device: seconds and memory of each method, and the whole training's time over LoRA's."""
    parts = []
    for device, told in cost.items():
        heads = (
            "method", "before the first step, s", "a step, s",
            f"both ({STEPS} steps), over LoRA", "peak, MB", "parameters",
        )  # fmt: skip
        lines = [f"**{device}**\n", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
        before, step = "seconds before the first step", "seconds of a step"
        whole = {name: one[before] + STEPS * one[step] for name, one in told["methods"].items()}
        for name, one in told["methods"].items():
            over = whole[name] / whole["lora"]
            size = f"{one['peak_MB']:,} | {one['parameters'] / 1e6:.2f} M"
            lines.append(f"| {name} | {one[before]:.1f} | {one[step]:.2f} | {over:.2f} | {size} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    found = [row for row in rows() if row["steps"] == STEPS]
    value, losses = tables(found), swept(found)
    devices = sorted({row["device"] for row in found})
    head = facts("python benchmarks/methods/tables.py")
    gaps, sizes, both = served(found), deployed(found), twice(all_rows())
    head |= {"rows": len(found), "devices": devices, "twice": both}
    write("methods", head | {"sweep": losses, "methods": value, "served": gaps, "MB": sizes})
    before, mark, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert mark, f"{PAGE} has no mark"
    made = [f"{len(found)} rows, made on: {'; '.join(devices)}.", "### Learning rates", sweep_markdown(losses)]
    cells = "Each cell: score ± deviation over seeds, loss (how many seeds; learning rate, with * that of other tasks)."
    made += ["### The same row on two devices", twice_markdown(both), "### Test rows", cells, test_markdown(value)]
    made += ["### Served", served_markdown(gaps)]
    if sizes:
        made += [deployed_markdown(sizes)]
    cost = RESULTS / "cost.json"
    if cost.exists():
        made += ["### Cost", cost_markdown(json.loads(cost.read_text(encoding="utf-8")))]
    PAGE.write_text(before + mark + "\n\n" + "\n\n".join(made) + "\n", encoding="utf-8")
    print("\n\n".join(made))


if __name__ == "__main__":
    main()
