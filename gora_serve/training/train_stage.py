"""The training stage of a run: the loop on the session's rows, with evaluations, checkpoints and a way to stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import nn

from gora_serve.config import TrainConfig, check_rows
from gora_serve.errors import RunError, Stopped
from gora_serve.progress import Listener
from gora_serve.training import inject
from gora_serve.training.checkpoint import (
    Checkpoint,
    capture,
    discard_after,
    restore,
    step_folder,
    steps_of,
    write_checkpoint,
)
from gora_serve.training.data import Dataset, schedule
from gora_serve.training.loop import START, Position, evaluate, train
from gora_serve.training.randomness import random_state, set_random_state
from gora_serve.training.run_folder import RunFolder
from gora_serve.training.session import LazyBatch, Session

Stop = Callable[[], int | None]  # the signal that asked to stop, if one did
NEXT = "the same command with --resume goes on"


class TrainStage:
    """The training of one run. `checkpoint`: where to go on from; `inputs`: what checkpoints say of their run.

    losses: on the evaluation data, and evaluating: the seconds that they took.
    """

    def __init__(
        self,
        session: Session,
        config: TrainConfig,
        folder: RunFolder,
        held_out: Dataset | None,
        *,
        checkpoint: Checkpoint | None,
        inputs: Mapping[str, Any],
        stop: Stop,
        listen: Listener,
    ) -> None:
        self.session, self.config, self.folder, self.held_out = session, config, folder, held_out
        self.checkpoint, self.inputs, self.stop, self.listen = checkpoint, inputs, stop, listen
        self.losses: dict[str, float] = dict(checkpoint.losses) if checkpoint else {}
        self.evaluating = checkpoint.evaluating if checkpoint else 0.0
        self.steps = count_steps(session, config)

    def run(self, model: nn.Module) -> None:
        """Train the model in place. Raises RunError naming the last checkpoint, or Stopped after writing one."""
        session, config, rows = self.session, self.config, self.session.data.examples
        micro = self.steps * config.grad_accum * session.accelerator.num_processes
        indices = schedule(len(rows), session.batch_size, batches=micro, seed=config.seed)
        set_seed(config.seed)
        self.go_back()
        if self.checkpoint is None:
            self.evaluate(model, "start", 0)
        try:
            train(
                model,
                session.batches(rows, indices),
                accelerator=session.accelerator,
                config=config,
                record=self.folder.metrics,
                after_step=lambda step: self.after_step(model, step),
                listen=self.listen,
                start=self.checkpoint.position if self.checkpoint else START,
                restore=lambda optimizer: self.restore(model, optimizer),
                save=lambda position, optimizer: self.save(model, position, optimizer),
            )
        except RunError as err:
            raise err.keeping(f"no adapter was written; {self.kept()}") from err

    def go_back(self) -> None:
        """Drop what the folder holds of steps after the checkpoint."""
        step = self.checkpoint.position.step if self.checkpoint else 0
        self.folder.cut_metrics(step if self.checkpoint else None)
        if self.folder.writes:
            discard_after(self.folder.path, step)

    def restore(self, model: nn.Module, optimizer: Any) -> None:
        if self.checkpoint is None:
            return
        accelerator = self.session.accelerator
        restore(model, optimizer, self.checkpoint.tensors)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(dict(self.checkpoint.scaler))
        set_random_state(self.checkpoint.random[accelerator.process_index], accelerator.device)

    def save(self, model: nn.Module, position: Position, optimizer: Any) -> None:
        """Write a checkpoint if one is due or a signal came. Every process calls this, the main one writes."""
        number = self.asked_to_stop()
        if number is None and not self.config.saves_at(position.step, self.steps):
            return
        accelerator = self.session.accelerator
        random = gather_object([random_state(accelerator.device)])
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        if self.folder.writes:
            self.folder.sync_metrics()
            tensors = capture(model, optimizer)
            checkpoint = Checkpoint(position, tensors, random, scaler, self.losses, self.inputs, self.evaluating)
            write_checkpoint(self.folder.path, checkpoint)
        if number is not None:
            what = f"stopped by {signal.Signals(number).name} after training step {position.step} of {self.steps}"
            folder = step_folder(self.folder.path, position.step)
            raise Stopped(what, number=number, kept=f"checkpoint {folder}", hint=NEXT)

    def asked_to_stop(self) -> int | None:
        """Return the signal that came to this process or, all together, to another."""
        number = self.stop() or 0
        accelerator = self.session.accelerator
        if accelerator.num_processes > 1:
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        return number or None

    def kept(self) -> str:
        """What a run that fails now leaves."""
        steps = steps_of(self.folder.path)
        if not steps:
            return "there is no checkpoint yet; metrics.jsonl of the unfinished run shows the steps before"
        return f"the last good checkpoint is {step_folder(self.folder.path, steps[0])}"

    def after_step(self, model: nn.Module, step: int) -> None:
        every = self.config.eval_every
        if step == self.steps:
            self.evaluate(model, "end", step)
        elif every and step % every == 0:
            self.evaluate(model, f"step {step}", step)

    def evaluate(self, model: nn.Module, name: str, step: int) -> None:
        """Measure the loss on the evaluation data, if there is any; at the start also the base's own."""
        if self.held_out is None:
            return
        started = time.perf_counter()
        batches: list[LazyBatch] = self.session.in_order(self.held_out.examples)
        accelerator = self.session.accelerator
        if name == "start":
            with inject.scaled(model, 0.0):
                self.losses["base"] = evaluate(model, batches, accelerator=accelerator)
            check_loss(self.losses["base"], "the base's loss on the evaluation data", code="GS-704")
            self.folder.metrics({"step": step, "base_eval_loss": self.losses["base"]})
        self.losses[name] = evaluate(model, batches, accelerator=accelerator)
        check_loss(self.losses[name], f"the loss on the evaluation data at step {step}", code="GS-704")
        self.folder.metrics({"step": step, "eval_loss": self.losses[name]})
        self.evaluating += time.perf_counter() - started


def count_steps(session: Session, config: TrainConfig) -> int:
    """Return how many optimizer steps --steps or --epochs asks for, in batches as `schedule` makes them.

    Raises UsageError where they take more rows than an order is drawn for.
    """
    rows, processes = len(session.data.examples), session.accelerator.num_processes
    steps, per_step = config.count_steps(rows, session.batch_size, processes)
    check_rows(steps * per_step, hint="fewer --steps or --epochs, or less --grad-accum")
    return steps


def check_loss(loss: float, what: str, *, code: str) -> None:
    """Raise RunError with this code if the loss is not finite."""
    if not math.isfinite(loss):
        raise RunError(
            f"{what} is {loss}", code=code, kept="no adapter was written",
            hint="look at the rows of that file, or load the base with --dtype float32",
        )  # fmt: skip
