"""All rows that are not there yet: first each method's learning rate, on validation rows, then the table on test rows.

    python benchmarks/methods/run.py BASE [--methods A B] [--tasks A B] [--seeds 3] [--jobs 1] [--minutes 60]

Rows go to results/methods.jsonl as they come, one for each (method, task, seed, lr, split, steps), so that it may be
stopped at any time and goes on where it was. BASE is SmolLM2-135M-Instruct, as `gora-serve demo` makes it.
`tables.py` makes the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import RESULTS

from methods.methods import Method, methods
from methods.tasks import TASKS

ROWS = RESULTS / "methods.jsonl"
KEY = ("method", "task", "seed", "lr", "split", "steps")
STEPS, SWEEP_SEED, SWEEP_ROWS = 120, 100, 150
EDGES = 2  # how often a sweep goes on beyond its edge, by half or twice
SERVED = ("pissa", "olora", "lora-ga", "gora")  # whose gap is measured
Rows = list[dict[str, Any]]


def all_rows(path: Path = ROWS) -> Rows:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(path: Path = ROWS) -> Rows:
    """Return the rows of a file; not those of a CPU that are there from an accelerator too."""
    return shadowed(all_rows(path))


def shadowed(every: Sequence[dict[str, Any]]) -> Rows:
    faster = {key(row) for row in every if not on_cpu(row)}
    return [row for row in every if not on_cpu(row) or key(row) not in faster]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def on_cpu(row: dict[str, Any]) -> bool:
    """A CPU trains in other arithmetic than an accelerator."""
    return str(row["device"]).startswith("CPU")


def sweep(found: Rows, chosen: Iterable[Method], tasks: Iterable[str], steps: int) -> Iterator[Rows]:
    """Yield the rows of the learning rates, for each method and task: one seed, validation rows.

    Where the best of all that were tried is the smallest or the largest, half or twice that is tried too, EDGES
    times at most.
    """
    for method in chosen:
        for task in tasks:
            if not method.like:
                shared = {"method": method.name, "task": task, "seed": SWEEP_SEED, "split": "valid", "steps": steps}
                wanted = (*method.rates, *beyond(method, tried(found, method, task, steps)))
                yield [shared | {"lr": lr, "rows": SWEEP_ROWS} for lr in wanted]


def beyond(method: Method, losses: dict[float, float]) -> tuple[float, ...]:
    """Return the rate beyond the edge at which a whole sweep has its best; none where the best lies inside."""
    if not is_whole(method, losses):
        return ()
    best = min(losses, key=lambda lr: losses[lr])
    if best == max(losses) < 2**EDGES * max(method.rates):
        return (2 * best,)
    if best == min(losses) > min(method.rates) / 2**EDGES:
        return (best / 2,)
    return ()


def tried(found: Rows, method: Method, task: str, steps: int) -> dict[float, float]:
    """Return the loss on validation rows at each learning rate that was tried."""
    swept = (method.like or method.name, task, SWEEP_SEED, "valid", steps)
    return {
        row["lr"]: row["eval_loss"] if math.isfinite(row["eval_loss"]) else math.inf
        for row in found
        if tuple(row[name] for name in ("method", "task", "seed", "split", "steps")) == swept
    }


def is_whole(method: Method, losses: Iterable[float]) -> bool:
    """Whether all of the method's own rates were tried."""
    return set(losses) >= set(method.rates)


def best_rate(found: Rows, method: Method, task: str, steps: int) -> float | None:
    """Return the learning rate of the lowest loss on validation rows: finer than the score of 150 answers.

    Of a task without a sweep of its own: that of the lowest mean, over the tasks that have one, of the loss over the
    lowest loss of the task, among the rates that all of them tried. A sweep that is not whole says nothing; None
    without any.
    """
    losses = {one: tried(found, method, one, steps) for one in TASKS}
    whole = {one: at for one, at in losses.items() if is_whole(method, at)}
    if task in whole:
        return min(whole[task], key=lambda lr: whole[task][lr])
    if not whole:
        return None
    common = set.intersection(*map(set, whole.values()))
    return min(common, key=lambda lr: sum(one[lr] / min(one.values()) for one in whole.values()))


def table(found: Rows, chosen: Iterable[Method], tasks: Iterable[str], seeds: int, steps: int) -> Iterator[Rows]:
    """Yield the rows of the table, where the learning rate is known; ablations last.

    The gap is measured with the first seed.
    """
    every = list(chosen)
    for ablation in (False, True):
        for seed in range(seeds):
            for task in tasks:
                for method in (one for one in every if (one.like is not None) == ablation):
                    lr = best_rate(found, method, task, steps)
                    if lr is not None:
                        row = {"method": method.name, "task": task, "seed": seed, "lr": lr, "split": "test"}
                        yield [row | {"steps": steps, "served": method.name in SERVED and seed == 0}]


class Worker:
    """A process of one.py, which makes rows one after another; started again when it died."""

    def __init__(self, base: str, *options: str) -> None:
        self.command = [sys.executable, str(Path(__file__).parent / "one.py"), base, *options]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, wanted: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        status = self.process.wait()
        self.process = self._start()
        return {"error": f"the process ended with {status}"}

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def work(worker: Worker, waiting: deque[Rows], path: Path, end: float) -> None:
    """Make rows, until none waits or the time is over, and append each as it comes."""
    while time.monotonic() < end:
        try:
            some = waiting.popleft()
        except IndexError:
            return
        for wanted in some:
            if time.monotonic() > end:
                return
            began = time.monotonic()
            row = worker.ask(wanted)
            told = " ".join(str(wanted[name]) for name in ("split", "method", "task", "seed", "lr"))
            if "error" in row:
                print("FAILED", told, row["error"], flush=True)
                continue
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            score = "" if row["score"] is None else f"score {row['score']:.3f} "
            print(f"{told}: {score}loss {row['eval_loss']:.4f} in {time.monotonic() - began:.0f} s", flush=True)


def make(workers: Sequence[Worker], wanted: Iterable[Rows], path: Path, end: float) -> None:
    """Make what is wanted and not there: one worker makes a group, one after another.

    An accelerator makes the rows of a CPU again.
    """
    there = {key(row) for row in rows(path) if not (on_cpu(row) and torch.cuda.is_available())}
    missing = ([one for one in group if key(one) not in there] for group in wanted)
    waiting = deque(group for group in missing if group)
    print(f"{sum(map(len, waiting))} rows to make", flush=True)
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(lambda worker: work(worker, waiting, path, end), workers))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--methods", nargs="*", default=list(methods(STEPS)))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--sweep", nargs="*", default=list(TASKS), help="the tasks whose validation rows are used")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of the rows")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once: more than one on a large accelerator")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after this time")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    chosen = [methods(asked.steps)[name] for name in asked.methods]
    asked.rows.parent.mkdir(exist_ok=True)
    workers = [Worker(asked.base) for _ in range(asked.jobs)]
    for _ in range(1 + EDGES):  # the last for what the edges ask for
        found = rows(asked.rows)
        make(workers, sweep(found, chosen, asked.sweep, asked.steps), asked.rows, end)
    found = rows(asked.rows)
    make(workers, table(found, chosen, asked.tasks, asked.seeds, asked.steps), asked.rows, end)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
