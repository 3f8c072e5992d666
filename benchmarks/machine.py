"""What every benchmark records beside its figures: the machine, the versions, the commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "peft")


def facts(command: str) -> dict[str, Any]:
    """Return the fields that head each result."""
    return {
        "command": command,
        "commit": commit(),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "vector units": vector_units()},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def vector_units() -> list[str]:
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in words]


def commit() -> str:
    """Return the commit of the checkout, and whether code differs from it; of a copy without git, what GORA_COMMIT
    says.
    """
    if told := os.environ.get("GORA_COMMIT"):
        return told
    return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno", "--", "*.py") else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
