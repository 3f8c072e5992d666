"""What each method costs: seconds before the first step, seconds of a step, and the most memory (table 8 of the paper).

    python benchmarks/methods/cost.py BASE [--steps 12] [--methods A B]

One method after another, each in a process of its own, and nothing beside them, so that times may be compared;
results/cost.json keeps one table for each device. Memory is torch's on CUDA, else that of the whole process. The base
is loaded, and quantised, before time is taken.
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--methods", nargs="*", default=list(MAIN))
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in asked.methods:
        wanted = {
            "method": name, "task": TASK, "seed": 0, "lr": methods(asked.steps)[name].rates[0], "split": "valid",
            "steps": asked.steps, "rows": 8,
        }  # fmt: skip
        worker = Worker(asked.base, "--alone")
        row = worker.ask(wanted)
        worker.close()
        if "error" in row:
            print("FAILED", name, row["error"], flush=True)
            continue
        device = row["device"]
        rows[name] = {
            "seconds before the first step": row["seconds"]["prepare"], "seconds of a step": row["seconds"]["step"],
            "peak_MB": round(row["peak_bytes"] / 1e6), "parameters": row["parameters"],
        }  # fmt: skip
        print(name, rows[name], flush=True)
    file = RESULTS / "cost.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings = {"task": TASK, "steps": asked.steps, "rows of a step": 8}
    told = facts("python benchmarks/methods/cost.py BASE") | {"settings": settings, "methods": rows}
    write("cost", before | {device: told})


if __name__ == "__main__":
    main()
