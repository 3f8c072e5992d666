"""Is the planned memory the measured one? Runs `probe` and `fit` on a real base, writes results/plan.json.

    .venv/bin/python benchmarks/plan.py BASE

Each case runs in a process of its own for two steps of rows that are cut to --max-length. Measured is the peak of its
resident set (VmHWM) less that of a process that imported the same libraries and did nothing. The first case is also
measured with MALLOC_TRIM_THRESHOLD_ set, with which glibc gives freed tensors back: it has no holes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from machine import facts, write

from gora_serve.config import DataConfig, FitConfig, InitConfig, ModelConfig, PlanConfig, ProbeConfig, TrainConfig
from gora_serve.training.memory import Parts, estimate
from gora_serve.training.shapes import read_shapes

MIB = 2**20
THREADS = 2
RETURNED = {"MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Case:
    """One measured run."""

    job: str
    dtype: str
    batch_size: int
    max_length: int
    checkpointing: bool = False
    offload: str = "none"
    mixed_precision: str = "no"


CASES = [
    Case("train", "float32", 4, 128),
    Case("train", "bfloat16", 4, 128),
    Case("train", "float32", 4, 128, checkpointing=True),
    Case("train", "float32", 2, 128, checkpointing=True, offload="disk"),
    Case("probe exact", "float32", 4, 128),
    Case("probe exact", "bfloat16", 4, 128),
    Case("probe sketch", "float32", 4, 128),
    Case("probe sketch", "bfloat16", 2, 128, checkpointing=True, offload="disk"),
    Case("train", "float32", 4, 128, mixed_precision="bf16"),
    Case("train", "float32", 4, 128, checkpointing=True, mixed_precision="bf16"),
    Case("probe exact", "float32", 4, 128, mixed_precision="bf16"),
]


def config_of(case: Case) -> FitConfig:
    return FitConfig(
        model=ModelConfig(dtype=case.dtype, offload=case.offload),  # type: ignore[arg-type]
        data=DataConfig(case.max_length, True, case.batch_size),
        probe=ProbeConfig(steps=2, mode="sketch" if case.job == "probe sketch" else "exact"),
        init=InitConfig(gamma=0.0),
        train=TrainConfig(
            method="lora",
            steps=2,
            gradient_checkpointing=case.checkpointing and case.offload == "none",
            mixed_precision=case.mixed_precision,  # type: ignore[arg-type]
        ),
    )


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def work(base: str, case: Case | None) -> None:
    """In a process of its own: import everything, do the job, print the peak in bytes."""
    import datasets  # noqa: F401
    import peft.tuners.lora  # noqa: F401
    import torch
    from transformers import AutoTokenizer
    from transformers.models.llama import modeling_llama  # noqa: F401

    from gora_serve.training.fit import fit
    from gora_serve.training.probe_run import probe_only

    torch.set_num_threads(THREADS)
    if case is None:
        AutoTokenizer.from_pretrained(base)
    else:
        with tempfile.TemporaryDirectory() as folder:
            row = {"text": " ".join(f"row {number} of many" for number in range(case.max_length))}
            data = Path(folder) / "rows.jsonl"
            data.write_text((json.dumps(row) + "\n") * 2 * case.batch_size)
            if case.job.startswith("probe"):
                probe_only(base, str(data), Path(folder) / "probe", config_of(case), rank_max=32)
            else:
                fit(base, str(data), Path(folder) / "run", config_of(case))
    print(f"peak {peak()}")


def measure(base: str, case: Case | None, environment: dict[str, str] | None = None) -> int:
    argument = json.dumps(asdict(case) if case else None)
    done = subprocess.run(
        [sys.executable, __file__, base, argument], env={**os.environ, **(environment or {})}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split("peak ")[1])


def planned(base: str, case: Case) -> Parts:
    fitted = config_of(case)
    config = PlanConfig(
        fitted.model, fitted.data, fitted.ranks, device="cpu", padded=False,
        mixed_precision=case.mixed_precision,  # type: ignore[arg-type]
    )  # fmt: skip
    plan = estimate(read_shapes(Path(base)), config)
    return plan.need(case.job, case.offload, checkpointing=case.checkpointing).device  # type: ignore[arg-type]


def compare(case: Case, parts: Parts, found: int) -> dict[str, Any]:
    expected = parts.total - parts.fixed
    row = {
        **asdict(case),
        "planned_mib": round(expected / MIB, 1),
        "measured_mib": round(found / MIB, 1),
        "error": round(expected / found - 1, 4),
        "parts_mib": {name: round(value / MIB, 1) for name, value in asdict(parts).items() if name != "fixed"},
    }
    print(json.dumps(row), flush=True)
    return row


def main(base: str) -> None:
    idle = measure(base, None)
    rows = [compare(case, planned(base, case), measure(base, case) - idle) for case in CASES]
    no_holes = replace(planned(base, CASES[0]), holes=0)
    returned = compare(CASES[0], no_holes, measure(base, CASES[0], RETURNED) - measure(base, None, RETURNED))
    result = {
        **facts("python benchmarks/plan.py BASE"),
        "base": "SmolLM2-135M-Instruct",
        "threads": THREADS,
        "libc": " ".join(platform.libc_ver()),
        "idle_mib": round(idle / MIB, 1),
        "largest_error": max(abs(row["error"]) for row in rows),
        "cases": rows,
        "with_freed_memory_returned": returned,
    }
    print(f"largest error {result['largest_error']:.1%}")
    write("plan", result)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        described = json.loads(sys.argv[2])
        work(sys.argv[1], Case(**described) if described else None)
    else:
        main(sys.argv[1])
