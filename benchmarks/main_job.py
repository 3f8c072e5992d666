"""How long does the main job take, and what does it gain? Reads a finished demo, writes results/main_job.json.

    make demo && .venv/bin/python benchmarks/main_job.py gora-demo

The result holds exact match before and after on unseen prompts, seconds by stage, parameters, γ, and the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from machine import facts, write


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gora-demo")
    demo = read(folder / "demo.json")
    runs = {path.name: read(path / "run.json") for path in sorted((folder / "runs").iterdir())}
    result = {
        **facts("make demo && .venv/bin/python benchmarks/main_job.py gora-demo"),
        "versions": next(iter(runs.values()))["versions"],
        "exact_match": demo["exact_match"],
        "prompts": len(demo["answers"]),
        "seconds": demo["seconds"],
        "seconds_in_all": round(sum(demo["seconds"].values()), 1),
        "runs": {
            name: {key: run["result"][key] for key in ("gamma", "parameters", "seconds_by_stage")}
            for name, run in runs.items()
        },
    }
    write("main_job", result)


if __name__ == "__main__":
    main()
