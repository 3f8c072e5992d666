"""The tables of the rows that are there: results/methods.json, and Markdown in docs/methods.md.

python benchmarks/methods/tables.py
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import RESULTS, facts, write
from scipy import stats

from methods import page
from methods.methods import methods
from methods.run import STEPS, SWEEP_SEED, all_rows, best_rate, is_whole, key, on_cpu, shadowed, tried
from methods.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
DEPLOYED = (1, 10, 100)  # tasks
RIVALS = ("lora", "gora")  # what every method is held against
BEGIN = "<!-- made by benchmarks/methods/tables.py -->"

Rows = Sequence[dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "rows": len(values),
    }


def paired(every: Rows, method: str, rival: str, what: str) -> dict[str, Any] | None:
    """Return the mean difference from the rival (of rank 32 for a method of rank 32) over the tasks that both have,
    with its standard error; and of each task over its seeds. None without any, and of the rival itself.
    every: test rows of tasks that were swept.

    Both rows of a difference are of a CPU, or both of an accelerator, which goes first.
    """
    against = f"{rival}-32" if method.endswith("-32") else rival
    by = {(row["method"], row["task"], row["seed"], on_cpu(row)): row for row in every}
    pairs: dict[str, dict[int, tuple[dict[str, Any], dict[str, Any]]]] = {}
    for (name, *rest), row in sorted(by.items(), key=lambda one: one[0]):
        if name == method != against and (against, *rest) in by:
            pairs.setdefault(rest[0], {}).setdefault(rest[1], (row, by[against, *rest]))
    if not pairs:
        return None
    differences = {task: [one[what] - other[what] for one, other in some.values()] for task, some in pairs.items()}
    means = [statistics.fmean(values) for values in differences.values()]
    better = sum(value > 0 if what == "score" else value < 0 for value in means)
    by_task = {
        task: with_error(values) | {"of seeds": [round(value, 3) for value in values]}
        for task, values in differences.items()
    }
    if what == "score":
        for task, some in pairs.items():
            by_task[task]["error over rows"] = error_over_rows(list(some.values()))
    return with_error(means) | {"better on": better, "by task": by_task}


def error_over_rows(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    """Return the standard error over test rows of the mean difference, each row's taken over the seeds; None where the
    credits of rows were not stored."""
    if not all("credits" in row for pair in pairs for row in pair):
        return None
    by_seed = ([a - b for a, b in zip(one["credits"], other["credits"], strict=True)] for one, other in pairs)
    of_rows = [statistics.fmean(row) for row in zip(*by_seed, strict=True)]
    return round(statistics.stdev(of_rows) / math.sqrt(len(of_rows)), 4)


def with_error(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, and where there are several its standard error and 95 % interval (Student's t)."""
    count, mean = len(values), statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    within = None if error is None else float(stats.t.ppf(0.975, count - 1)) * error
    return {
        "mean": round(mean, 4) + 0.0,
        "error": None if error is None else round(error, 4),
        "interval": None if within is None else [round(mean - within, 3) + 0.0, round(mean + within, 3) + 0.0],
        "count": count,
    }


def tables(every: Rows) -> dict[str, Any]:
    """Return of each method what its test rows at its learning rate say; every: those that were made twice too."""
    found = shadowed(every)
    best = at_best(every, found)
    test = of_one_device(best)
    pairs = [row for row in best if swept_whole(row["method"], row["task"], found)]
    names = list(dict.fromkeys(row["method"] for row in test))
    value: dict[str, Any] = {}
    for name in names:
        own = [row for row in test if row["method"] == name]
        by_task = {task: [row for row in own if row["task"] == task] for task in TASKS}
        value[name] = {
            "tasks": {
                task: {what: spread([row[what] for row in some]) for what in ("score", "eval_loss")}
                | {"lr": some[0]["lr"], "swept": swept_whole(name, task, found), "accelerator": not on_cpu(some[0])}
                for task, some in by_task.items() if some
            },
            "parameters": own[0]["parameters"],
            "against": {
                rival: {"score": paired(pairs, name, rival, "score"), "loss": paired(pairs, name, rival, "eval_loss")}
                for rival in RIVALS
            },
        }  # fmt: skip
    return value


def of_one_device(some: Rows) -> Rows:
    """Return the rows of a CPU, or those of an accelerator, of each method and task: where there are more seeds, and of
    as many the accelerator's. A mean over both would mix two arithmetics."""
    counts = Counter((row["method"], row["task"], on_cpu(row)) for row in some)

    def is_first(row: dict[str, Any]) -> bool:
        here, there = (counts[row["method"], row["task"], cpu] for cpu in (on_cpu(row), not on_cpu(row)))
        return here > there or (here == there and not on_cpu(row))

    return [row for row in some if is_first(row)]


def at_best(some: Rows, found: Rows) -> Rows:
    """Return the test rows at the learning rates that the sweeps give."""
    return [row for row in some if row["split"] == "test" and row["lr"] == rate_of(row, found)]


def swept_whole(name: str, task: str, found: Rows) -> bool:
    """Whether the task has a whole sweep of its own: else its rate is that of others."""
    method = methods(STEPS)[name]
    return is_whole(method, tried(list(found), method, task, STEPS))


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
        if row["split"] == "valid" and row["seed"] == SWEEP_SEED:
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


def results(every: Rows) -> dict[str, Any]:
    """Return all that the tables show; every: all rows of STEPS steps."""
    found = shadowed(every)
    return {
        "rows": len(found), "devices": sorted({row["device"] for row in found}), "twice": twice(every),
        "sweep": swept(found), "methods": tables(every), "served": served(found), "MB": deployed(found),
    }  # fmt: skip


def markdown(value: dict[str, Any]) -> str:
    """Return the page's tables."""
    chance = stored("guessing").get("tasks", {})
    made = [f"{value['rows']} rows, made on: {'; '.join(value['devices'])}."]
    made += ["### Learning rates", page.sweep(value["sweep"], chance)]
    made += ["### The same row on two devices", page.twice(value["twice"])]
    cells = "Each cell: score ± deviation over seeds, loss (how many seeds; learning rate, with * that of other tasks)."
    cells += " All of a cell are of a CPU, or where it says GPU of an accelerator."
    made += ["### Test rows", cells, page.test(value["methods"], chance)]
    made += ["### Against LoRA", page.OF_PAIRS, page.against(value["methods"], "lora")]
    made += ["### Against GoRA", page.against(value["methods"], "gora")]
    made += ["### Served", page.served(value["served"])]
    if value["MB"]:
        made += [page.deployed(value["MB"])]
    for name, title, shown in (("served", "Served by vLLM", page.by_vllm), ("cost", "Cost", page.cost)):
        if result := stored(name):
            made += [f"### {title}", shown(result)]
    return "\n\n".join(made)


def stored(name: str) -> dict[str, Any]:
    """Return another script's result; nothing where it has not run."""
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def main() -> None:
    value = results([row for row in all_rows() if row["steps"] == STEPS])
    write("methods", facts("python benchmarks/methods/tables.py") | value)
    before, mark, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert mark, f"{PAGE} has no mark"
    made = markdown(value)
    PAGE.write_text(f"{before}{mark}\n\n{made}\n", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
