"""What each method costs: seconds before the first step, seconds of a step, and the most memory (table 8 of the paper).

    python benchmarks/methods/cost.py BASE [--steps 12] [--methods A B]

One method after another, each in a process of its own, and nothing beside them. Before each LoRA is measured again:
a machine's speed drifts, so times are compared with those of the minute before. results/cost.json keeps one table for
each device; methods that are not asked for stay as they were. Memory is torch's on CUDA, else that of the whole
process. The base is loaded, and quantised, before time is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import RESULTS, facts, write

from methods.methods import methods
from methods.run import Worker

MAIN = (
    "lora", "full", "rslora", "lora+", "dora", "pissa", "olora", "milora", "eva", "corda", "lora-ga", "adalora",
    "gora", "gora-sketch", "gora-pro", "qgora", "lora-32", "gora-32",
)  # fmt: skip
TASK = "mnli"


def measure(base: str, name: str, steps: int) -> dict[str, Any]:
    """Return a method's row, or {"error": ...}."""
    rate = methods(steps)[name].rates[0]
    worker = Worker(base, "--alone")
    row = worker.ask({"method": name, "task": TASK, "seed": 0, "lr": rate, "split": "valid", "steps": steps, "rows": 8})
    worker.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--methods", nargs="*", default=list(MAIN))
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    file = RESULTS / "cost.json"
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in asked.methods:
        lora, row = measure(asked.base, "lora", asked.steps), measure(asked.base, name, asked.steps)
        if "error" in row or "error" in lora:
            print("FAILED", name, row.get("error"), lora.get("error"), flush=True)
            continue
        measured = {
            "seconds before the first step": row["seconds"]["prepare"], "seconds of a step": row["seconds"]["step"],
            "LoRA's seconds": [lora["seconds"]["prepare"], lora["seconds"]["step"]],
            "peak_MB": round(row["peak_bytes"] / 1e6), "parameters": row["parameters"],
            "steps": asked.steps, "commit": row["commit"],
        }  # fmt: skip
        print(name, measured, flush=True)
        settings = {"task": TASK, "rows of a step": 8}
        others = told.get(row["device"], {}).get("methods", {})
        told[row["device"]] = facts("python benchmarks/methods/cost.py BASE") | {
            "settings": settings, "methods": others | {name: measured},
        }  # fmt: skip
        write("cost", told)


if __name__ == "__main__":
    main()
