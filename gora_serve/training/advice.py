"""Which settings fit a given memory: a machine's free memory, and the first way to fit that it has room for."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gora_serve.config import Offload
from gora_serve.container import memory_left
from gora_serve.errors import MachineError
from gora_serve.training.activations import Job
from gora_serve.training.memory import MemoryPlan, Need

Device = Literal["gpu", "cpu"]
Probe = Literal["exact", "sketch"]
PROBES: tuple[Probe, ...] = ("exact", "sketch")
MIB = 2**20


@dataclass(frozen=True)
class Advice:
    """The settings to take, and the largest need among them: the probe's or the training's.

    auto: what `--probe auto` would take at these settings: exact while whole gradients fit half of what is free.
    """

    probe: Probe
    offload: Offload
    checkpointing: bool
    peak: Need
    auto: Probe

    @property
    def options(self) -> tuple[str, ...]:
        """What to say to `fit` beside its defaults."""
        words = ["--probe", self.probe]
        words += ["--offload", self.offload] if self.offload != "none" else []
        words += ["--gradient-checkpointing"] if self.checkpointing and self.offload == "none" else []
        return tuple(words)


def advise(plan: MemoryPlan, memory: int) -> Advice | None:
    """Return the first settings that fit `memory` bytes of each device, fastest first. None if nothing fits.

    Weights that stay on the device come before weights that travel, and kept activations before computing them
    twice; the exact probe before the sketch.
    """
    for offload, checkpointing in _manners(plan):
        train = plan.need("train", offload, checkpointing=checkpointing)
        for probe in PROBES:
            measured = plan.need(_job(probe), offload, checkpointing=checkpointing)
            peak = max(train, measured, key=lambda need: need.device.total)
            if peak.device.total <= memory:
                exact = plan.need("probe exact", offload, checkpointing=checkpointing).device
                free = memory - exact.weights - exact.fixed
                return Advice(
                    probe, offload, checkpointing, peak, "exact" if exact.statistics <= free / 2 else "sketch"
                )
    return None


def _job(probe: Probe) -> Job:
    return "probe exact" if probe == "exact" else "probe sketch"


def _manners(plan: MemoryPlan) -> list[tuple[Offload, bool]]:
    """The ways to run, fastest first."""
    return [(need.offload, need.checkpointing) for need in plan.needs if need.job == "train"]


def least(plan: MemoryPlan) -> int:
    """Return the bytes of a device that the most sparing settings take."""
    pairs = [(plan.need("train", o, checkpointing=c), plan.need("probe sketch", o, checkpointing=c))
             for o, c in _manners(plan)]  # fmt: skip
    return min(max(need.device.total for need in pair) for pair in pairs)


def free_memory(device: Device | None) -> tuple[Device, int]:
    """Return (device, free bytes) of this machine: of the fullest GPU where there is one, else of the host, or of our
    container on it.

    `device` says which to ask. Raises MachineError (GS-589) where the machine does not tell.
    """
    if device != "cpu" and shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sizes = [int(word) for word in re.findall(r"^\d+$", done.stdout, re.MULTILINE)]
        if sizes:
            return "gpu", min(sizes) * MIB
    if device != "gpu":
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", _meminfo(), re.MULTILINE)
        if found:
            return "cpu", int(min(int(found[1]) * 1024, memory_left()))
    raise MachineError(
        "this machine does not say how much memory is free", code="GS-589", actual=device or "no GPU, no /proc/meminfo",
        hint="give --memory and --device",
    )  # fmt: skip


def _meminfo() -> str:
    path = Path("/proc/meminfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""
