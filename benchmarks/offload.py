"""How much memory does --offload save? Runs probe and fit in fresh processes, writes results/offload.json.

    .venv/bin/python benchmarks/offload.py BASE DATA

For each of --offload none, cpu and disk: the highest resident set of the whole process (VmHWM of /proc/self/status,
file-mapped pages included), for a probe and for training steps of plain LoRA, and the losses. `none` runs with and
without gradient checkpointing, which offloading always uses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import facts, write

from gora_serve.config import DataConfig, FitConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig

STEPS, BATCH, TOKENS = 3, 2, 128
# glibc otherwise keeps freed memory by a rule of its own, and the same run peaks 100 MB higher or lower
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
RUNS = (("none", False), ("none", True), ("cpu", True), ("disk", True))  # offload, gradient checkpointing


def settings(offload: str, checkpointing: bool) -> FitConfig:
    return FitConfig(
        model=ModelConfig(offload=offload),  # type: ignore[arg-type]
        data=DataConfig(max_length=TOKENS, batch_size=BATCH),
        probe=ProbeConfig(steps=STEPS),
        ranks=RankConfig(rank=8),
        train=TrainConfig(method="lora", steps=STEPS, gradient_checkpointing=checkpointing),
    )


def peak() -> int:
    """The highest resident set of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def child(stage: str, base: str, data: str, offload: str, checkpointing: bool) -> None:
    """One run, in this process; prints its peak and losses as JSON."""
    import torch

    from gora_serve.training.fit import fit
    from gora_serve.training.probe_run import probe_only

    torch.set_num_threads(1)
    config = settings(offload, checkpointing)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"

        def listen(event: Any) -> None:
            if event.stage in ("probe", "train"):
                losses.append(event.fields["loss"])

        if stage == "probe":
            probe_only(base, data, output, config, rank_max=config.ranks.highest, listen=listen)
        else:
            fit(base, data, output, config, listen=listen)
    print(json.dumps({"peak": peak(), "losses": losses}))


def measure(stage: str, base: str, data: str, offload: str, checkpointing: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, base, data, "--child", stage, offload, str(int(checkpointing))]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{stage:5} --offload {offload:4} checkpointing {checkpointing!s:5} {answer['peak'] / 2**20:7.1f} MiB")
    return {"offload": offload, "gradient_checkpointing": checkpointing, **answer}


def main() -> None:
    base, data = sys.argv[1:3]
    if "--child" in sys.argv:
        stage, offload, checkpointing = sys.argv[4:7]
        child(stage, base, data, offload, checkpointing == "1")
        return
    size = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    stages = {}
    for stage in ("probe", "train"):
        runs = [measure(stage, base, data, *run) for run in RUNS]
        plain, checkpointed, _, disk = (run["peak"] for run in runs)
        stages[stage] = {
            "runs": runs,
            "losses_equal": all(run["losses"] == runs[0]["losses"] for run in runs),
            "disk_saves_of_base": round((plain - disk) / size, 3),
            "disk_saves_of_base_both_checkpointed": round((checkpointed - disk) / size, 3),
        }
    result = {
        **facts(".venv/bin/python benchmarks/offload.py BASE DATA"),
        "base": {"name": Path(base).name, "bytes": size},
        "data": Path(data).parent.name,
        "settings": {"steps": STEPS, "batch_size": BATCH, "tokens": TOKENS, "threads": 1, "allocator": ALLOCATOR},
        "stages": stages,
    }
    write("offload", result)


if __name__ == "__main__":
    main()
