"""How long does the main job take, and what does it gain? Reads a finished demo, writes results/main_job.json.

    make demo && .venv/bin/python benchmarks/main_job.py gora-demo

The result holds exact match before and after on unseen prompts, seconds by stage, parameters, γ, and the machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "main_job.json"


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def vector_units() -> list[str]:
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in words]


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gora-demo")
    demo = read(folder / "demo.json")
    runs = {path.name: read(path / "run.json") for path in sorted((folder / "runs").iterdir())}
    result = {
        "command": "make demo && .venv/bin/python benchmarks/main_job.py gora-demo",
        "commit": commit(),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "vector units": vector_units()},
        "python": platform.python_version(),
        "versions": next(iter(runs.values()))["versions"],
        "exact_match": demo["exact_match"],
        "prompts": len(demo["answers"]),
        "seconds": demo["seconds"],
        "seconds_in_all": round(sum(seconds for name, seconds in demo["seconds"].items() if name != "ask"), 1),
        "runs": {
            name: {key: run["result"][key] for key in ("gamma", "parameters", "seconds_by_stage")}
            for name, run in runs.items()
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
