"""Several processes: each runs the frozen base on its own batches, and only small sums travel.

The base is not wrapped in anything: it has no gradients. The factors' gradients are averaged once per optimizer
step, in one flat buffer. This is what DDP would do, and it also holds for offloaded and for sharded bases.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gora_serve.config import TrainConfig
from gora_serve.errors import UsageError


def make_accelerator(train: TrainConfig) -> Any:
    """Return Accelerate's view of this machine and of the other processes. Raises UsageError for what it cannot be.

    A mixed precision of None is what Accelerate's environment says, or "no".
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(
            "fit and probe do not run under DeepSpeed", code="GS-225",
            hint="FSDP2 shards the base as ZeRO-3 does: accelerate launch --use_fsdp --fsdp_version 2; "
            "see docs/devices.md",
        )  # fmt: skip
    precision = train.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # else the first of a process holds for all; the group of processes stays
    try:
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError as err:
        raise UsageError(
            "Accelerate refuses these settings",
            code="GS-204",
            hint="change --mixed-precision, or Accelerate's configuration",
            actual=str(err),
        ) from err
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise UsageError(
            "the processes do not find each other: each would make the whole run, into the same output",
            code="GS-226", expected=f"{started} processes", actual=accelerator.num_processes,
            hint="on CPUs, set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu",
        )  # fmt: skip
    accelerator.gradient_accumulation_steps = train.grad_accum  # the environment would win over the constructor
    return accelerator


def sum_over_processes(tensor: Tensor, accelerator: Any) -> Tensor:
    """Return the sum over processes, on the tensor's own device and in its dtype."""
    if accelerator.num_processes == 1:
        return tensor
    summed: Tensor = accelerator.reduce(tensor.to(accelerator.device), "sum")
    return summed.to(tensor.device)


def share_start(parameters: Sequence[nn.Parameter], accelerator: Any) -> None:
    """Give all processes the main one's values, in place: rounding on another machine must not part them."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    shared = broadcast(flat, from_process=0).split([parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, values in zip(parameters, shared, strict=True):
            parameter.copy_(values.view_as(parameter))


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Any) -> None:
    """Replace each gradient by its mean over the processes, in place, with one all-reduce.

    A process whose batches did not reach a parameter counts with zeros; one that no process reached keeps None.
    Under fp16 these are the scaled gradients: call it before they are unscaled.
    """
    if accelerator.num_processes == 1:
        return
    reached = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    flat: Tensor = accelerator.reduce(torch.cat([*parts, reached]), "sum")
    *means, reached = (flat / accelerator.num_processes).split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, mean, share in zip(parameters, means, reached.tolist(), strict=True):
        if share > 0:
            parameter.grad = mean.view_as(parameter)
