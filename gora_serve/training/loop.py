"""The training loop and evaluation, on whatever devices Accelerate gives. Knows nothing of GoRA or of files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gora_serve.config import TrainConfig
from gora_serve.errors import RunError
from gora_serve.progress import Listener, Progress
from gora_serve.training.loss import Batch, input_tokens, loss_tokens, mean_loss
from gora_serve.training.processes import average_gradients, share_start

Record = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Position:
    """Where training stands: optimizer steps taken, tokens seen by all processes, seconds spent on them."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


START = Position()


def cosine_with_floor(step: int, steps: int, *, warmup: float, floor: float) -> float:
    """Return the learning-rate factor of optimiser step `step`, 0-based.

    Linear from 0 over the first `warmup` share of steps (the first step already moves), then a half cosine down
    to `floor`.
    """
    warm = math.ceil(round(warmup * steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warm:
        return (step + 1) / (warm + 1)
    share = (step - warm) / max(1, steps - 1 - warm)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the LoRA factors: B (and nothing else) learns config.ratio times faster than A (LoRA+)."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    B = [parameter for name, parameter in trainable.items() if "lora_B" in name]  # noqa: N806
    rest = [parameter for name, parameter in trainable.items() if "lora_B" not in name]
    groups = [
        {"params": rest, "lr": config.lr, "peak": config.lr},
        {"params": B, "lr": config.lr * config.ratio, "peak": config.lr * config.ratio},
    ]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def train(
    model: nn.Module,
    batches: Sequence[Callable[[], Batch]],
    *,
    accelerator: Any,
    config: TrainConfig,
    record: Record,
    after_step: Callable[[int], None],
    listen: Listener,
    start: Position = START,
    restore: Callable[[Any], None] = lambda optimizer: None,
    save: Callable[[Position, Any], None] = lambda position, optimizer: None,
) -> None:
    """Take len(batches) / grad_accum optimiser steps. The model is trained in place.

    `batches` are this process's micro-batches. `record` gets the numbers of each step, `after_step` its 1-based
    number, and then `save` the position and the optimizer, to keep them. Training that was interrupted goes on at
    `start`, once `restore` has put model, optimizer and random generators into the state that they had there.
    Raises RunError naming the step when the loss or the gradient is not finite; that step is not taken.
    """
    steps = len(batches) // config.grad_accum
    model.train()
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    restore(optimizer)
    share_start(parameters, accelerator)
    started = time.perf_counter() - start.seconds
    seen = start.tokens
    for step in range(start.step, steps):
        factor = cosine_with_floor(step, steps, warmup=config.warmup, floor=config.floor)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        total = torch.zeros(2, device=accelerator.device)  # loss, tokens
        for batch in batches[step * config.grad_accum : (step + 1) * config.grad_accum]:
            total += _backward(model, batch(), accelerator, config.grad_accum)
        average_gradients(parameters, accelerator)
        loss, tokens = _over_processes(total, accelerator)
        norm = _clip(accelerator, parameters, config)
        _check_finite(loss, norm, step + 1, fp16=accelerator.mixed_precision == "fp16")
        optimizer.step()
        optimizer.zero_grad()
        seen += int(tokens)
        seconds = time.perf_counter() - started
        numbers = {"loss": loss, "lr": config.lr * factor, "grad_norm": norm, "tokens": seen}
        record({"step": step + 1, **numbers, "seconds": seconds})
        listen(Progress("train", step + 1, steps, {"loss": loss, "tokens/s": seen / seconds}))
        paused = time.perf_counter()
        after_step(step + 1)
        started += time.perf_counter() - paused  # an evaluation is no training
        save(Position(step + 1, seen, time.perf_counter() - started), optimizer)
    accelerator.free_memory()


def _backward(model: nn.Module, batch: Batch, accelerator: Any, grad_accum: int) -> Tensor:
    with accelerator.autocast():
        loss = mean_loss(model, batch)
    accelerator.backward(loss)
    tokens = input_tokens(batch)
    return torch.stack([loss.detach() / grad_accum, tokens.to(loss.device, loss.dtype)])


def _over_processes(total: Tensor, accelerator: Any) -> tuple[float, float]:
    summed = accelerator.reduce(total, "sum")
    return float(summed[0]) / accelerator.num_processes, float(summed[1])


def _clip(accelerator: Any, parameters: list[nn.Parameter], config: TrainConfig) -> float:
    limit = config.max_grad_norm if config.max_grad_norm is not None else math.inf
    accelerator.unscale_gradients()
    return float(nn.utils.clip_grad_norm_(parameters, limit))


def _check_finite(loss: float, norm: float, step: int, *, fp16: bool) -> None:
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    value = loss if what == "loss" else norm
    if not math.isfinite(value) and not (fp16 and what == "gradient norm"):  # the fp16 scaler skips such a step
        raise RunError(
            f"the {what} of training step {step} is {value}", code="GS-702",
            kept="no adapter was written; metrics.jsonl of the unfinished run shows the steps before",
            hint="lower --lr or --gamma, or load the base with --dtype float32",
        )  # fmt: skip


def evaluate(model: nn.Module, batches: Sequence[Callable[[], Batch]], *, accelerator: Any) -> float:
    """Return the mean loss per token with loss over all processes' batches. Restores the training mode."""
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
    with torch.inference_mode(), accelerator.autocast():
        for batch in batches:
            values = batch()
            tokens, loss = loss_tokens(values), mean_loss(model, values)  # run also without loss: see Session.in_order
            if tokens:
                total += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
    model.train(training)
    total = accelerator.reduce(total.to(torch.float32).to(accelerator.device), "sum")
    return float(total[0] / total[1]) if total[1] else math.nan
