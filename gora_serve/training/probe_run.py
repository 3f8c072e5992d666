"""The probe on a real base: micro-batches of a session in, statistics out, for `probe` and for `fit`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gora_serve.config import FitConfig, ProbeConfig, RankConfig, check_rows
from gora_serve.container import memory_left
from gora_serve.gora.ranks import lora_parameters
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.integrity.bases import locate_base
from gora_serve.integrity.files import staged_folder, write_json
from gora_serve.integrity.space import require_space
from gora_serve.integrity.staging import check_target
from gora_serve.progress import Listener, silent
from gora_serve.training.data import schedule
from gora_serve.training.encode import Example
from gora_serve.training.loss import input_tokens, mean_loss
from gora_serve.training.out_of_memory import naming_memory
from gora_serve.training.probe import probe
from gora_serve.training.probe_files import write_probe
from gora_serve.training.processes import sum_over_processes
from gora_serve.training.session import (
    Session,
    check_memory,
    check_untouched,
    open_session,
    versions,
)
from gora_serve.training.sharding import check_unsharded
from gora_serve.training.weights import weight_shape

log = logging.getLogger(__name__)

PROBE_RUN_SCHEMA = "gora-serve/probe-run/1"


def probe_session(
    session: Session,
    examples: Sequence[Example],
    config: ProbeConfig,
    ranks: RankConfig,
    *,
    rank_max: int,
    listen: Listener,
) -> GradientStatistics:
    """Probe the session's targets over config.most_steps micro-batches in all, shared out over the processes.

    After exploratory steps (GoRA-pro) the weights in memory are hashed: MismatchError if one is not what it was.
    """
    world = session.accelerator.num_processes
    if config.lr:
        check_unsharded(session.accelerator, "exploratory steps (--probe-lr)")
    steps = -(-config.most_steps // world) * world
    rows = steps * min(session.batch_size, len(examples))
    check_rows(rows, hint="fewer --probe-steps, or a smaller --batch-size")
    batches = session.batches(examples, schedule(len(examples), session.batch_size, batches=steps, seed=session.seed))
    chosen, device = choose_mode(session, config)
    local = len(batches)
    chosen = replace(chosen, longest=local) if config.steps == "auto" else replace(chosen, steps=local)
    with checkpointing_in_eval(session.model):
        statistics = probe(
            session.model,
            (batch() for batch in batches),
            lambda model, batch: _loss(model, batch, session.accelerator),
            modules=session.modules,
            rank_max=rank_max,
            generator=torch.Generator().manual_seed(session.seed),
            config=chosen,
            ranks=ranks,
            count_batch=lambda batch: (len(batch["labels"]), int(input_tokens(batch))),
            reduce=lambda tensor: sum_over_processes(tensor, session.accelerator),
            processes=world,
            device=device,
            listen=listen,
        )
    if config.lr:
        check_memory(session, session.model)
    return statistics


def choose_mode(session: Session, config: ProbeConfig) -> tuple[ProbeConfig, torch.device]:
    """Return the settings with "auto" decided, the same on every process, and where the sums are to be kept.

    Whole gradients stay on the device while they fit config.memory; else "auto" takes a sketch. "exact", and "auto"
    where something needs them, keep them in the host's memory all the same, with a warning.
    """
    accelerator = session.accelerator
    needed = sum(4 * math.prod(weight_shape(module)) for module in session.modules.values())
    limit = config.memory * 2**30 if config.memory is not None else _free_bytes(accelerator) / 2
    too_small = sum_over_processes(torch.tensor(float(needed > limit)), accelerator)
    if config.mode == "sketch" or not too_small:
        return replace(config, mode="sketch" if config.mode == "sketch" else "exact"), accelerator.device
    if config.mode == "auto" and not config.needs_exact:
        return replace(config, mode="sketch"), accelerator.device
    if accelerator.is_main_process:
        log.warning(
            "whole gradients of %.3g GiB are kept in the host's memory: more than %s allows (%.3g GiB), but %s",
            needed / 2**30, "half of what is free" if config.memory is None else "--probe-memory", limit / 2**30,
            "--probe exact was asked for" if config.mode == "exact" else "nuclear norms and --probe-lr need them",
        )  # fmt: skip
    return replace(config, mode="exact"), torch.device("cpu")


def _free_bytes(accelerator: Any) -> float:
    """The free memory of the device; of the host, this process's share."""
    if accelerator.device.type == "cuda":
        return float(torch.cuda.mem_get_info(accelerator.device)[0])
    free = min(float(psutil.virtual_memory().available), memory_left())
    return free / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _loss(model: nn.Module, batch: Mapping[str, Tensor], accelerator: Any) -> Tensor:
    # float16 gradients underflow without loss scaling: the probe then runs in the weights' own dtype
    with nullcontext() if accelerator.mixed_precision == "fp16" else accelerator.autocast():
        return mean_loss(model, batch)


@contextmanager
def checkpointing_in_eval(model: nn.Module) -> Iterator[None]:
    """Let blocks with gradient checkpointing use it although the model is in eval mode, and compute as in eval mode.

    A block asks its own flag whether to use checkpoints, and so does the dropout that it applies itself: the flag is
    up when the block is called and down while it computes, the second time too.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    blocks = [block for block in blocks if block.gradient_checkpointing and not block.training]
    checkpoints = {block: block._gradient_checkpointing_func for block in blocks}
    for block in blocks:
        block.training = True
        block._gradient_checkpointing_func = partial(_computing_in_eval, block, checkpoints[block])
    try:
        yield
    finally:
        for block in blocks:
            block.training = False
            block._gradient_checkpointing_func = checkpoints[block]


def _computing_in_eval(
    block: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any
) -> Any:
    def compute(*inner: Any) -> Any:
        block.training = False
        try:
            return function(*inner)
        finally:
            block.training = True

    return checkpoint(compute, *args)


def probe_only(
    base: str,
    data: str,
    output: Path,
    config: FitConfig,
    *,
    rank_max: int,
    overwrite: bool = False,
    listen: Listener = silent,
) -> GradientStatistics:
    """Run the gradient probe of `fit` alone and write probe.json and statistics.safetensors into `output`.

    rank_max: how many rows A_max gets, and so the largest rank that B can be made for later. Raises as `fit`.
    """
    config.validate()
    check_target(output, overwrite=overwrite, protect=[locate_base(base).path])
    session = open_session(base, data, model=config.model, rows=config.data, train=config.train, listen=listen)
    shapes = {path: weight_shape(module) for path, module in session.modules.items()}
    require_space(output, 4 * lora_parameters(shapes, rank_max))  # A_max and G A_maxᵀ, float32
    with naming_memory():
        rows, probing = session.data.examples, config.probe
        statistics = probe_session(session, rows, probing, config.ranks, rank_max=rank_max, listen=listen)
    check_untouched(session, session.model, listen=listen)
    if session.accelerator.is_main_process:
        with staged_folder(output, overwrite=overwrite, protect=[session.base.path]) as folder:
            write_probe(folder, statistics, session.base_record, config.probe.importance)
            record = {"config": asdict(config), "data": session.data.summary(), "versions": versions()}
            write_json(folder / "run.json", {"schema": PROBE_RUN_SCHEMA, **record})
    return statistics
