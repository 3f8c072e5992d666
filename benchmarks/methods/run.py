"""All rows that are not there yet: first each method's learning rate, on validation rows, then the table on test rows.

    python benchmarks/methods/run.py BASE [--methods A B] [--tasks A B] [--seeds 3] [--jobs 1] [--minutes 60]

Rows go to results/methods.jsonl as they come, one for each (method, task, seed, lr, split, steps), so that it may be
stopped at any time and goes on where it was. BASE is SmolLM2-135M-Instruct, as `gora-serve demo` makes it.
`tables.py` makes the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import RESULTS

from methods.methods import Method, methods
from methods.tasks import TASKS

ROWS = RESULTS / "methods.jsonl"
KEY = ("method", "task", "seed", "lr", "split", "steps")
SWEEP_SEED, SWEEP_ROWS = 100, 150
INITIALS = ("pissa", "olora", "lora-ga", "gora")  # whose gap is measured, served


def rows() -> list[dict[str, Any]]:
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def sweep(chosen: Iterable[Method], tasks: Iterable[str], steps: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the learning rates: one seed, validation rows."""
    for task in tasks:
        for method in chosen:
            for lr in () if method.like else method.rates:
                yield {
                    "method": method.name, "task": task, "seed": SWEEP_SEED, "lr": lr, "split": "valid",
                    "steps": steps, "rows": SWEEP_ROWS,
                }  # fmt: skip


def best_rate(found: list[dict[str, Any]], method: Method, task: str, steps: int) -> float | None:
    """Return the learning rate of the lowest loss on validation rows: finer than the score of 150 answers."""
    name = method.like or method.name
    tried = [
        row for row in found if (row["method"], row["task"], row["split"], row["steps"]) == (name, task, "valid", steps)
    ]
    return min(tried, key=lambda row: row["eval_loss"])["lr"] if tried else None


def table(chosen: Iterable[Method], tasks: Iterable[str], seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, where the learning rate is known."""
    found, every = rows(), list(chosen)
    for seed in range(seeds):
        for task in tasks:
            for method in every:
                lr = best_rate(found, method, task, steps)
                if lr is not None:
                    yield {
                        "method": method.name, "task": task, "seed": seed, "lr": lr, "split": "test", "steps": steps,
                        "served": method.name in INITIALS,
                    }  # fmt: skip


def work(base: str, wanted: dict[str, Any]) -> None:
    """Make one row in a process of its own, and append it."""
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__).parent / "one.py"), base, json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"FAILED {wanted}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return
    row = json.loads(done.stdout.strip().splitlines()[-1])
    with ROWS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    told = {name: row[name] for name in ("method", "task", "seed", "lr", "split")}
    print(told, f"score {row['score']:.3f} loss {row['eval_loss']:.4f} in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--methods", nargs="*", default=list(methods(120)))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once: more than one on a large accelerator")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after this time")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    chosen = [methods(asked.steps)[name] for name in asked.methods]
    for wanted in (
        lambda: sweep(chosen, asked.tasks, asked.steps), lambda: table(chosen, asked.tasks, asked.seeds, asked.steps)
    ):  # fmt: skip
        there = {tuple(row[name] for name in KEY) for row in rows()}
        missing = [one for one in wanted() if tuple(one[name] for name in KEY) not in there]
        print(f"{len(missing)} rows to make", flush=True)
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda one: work(asked.base, one) if time.monotonic() < end else None, missing))


if __name__ == "__main__":
    main()
