"""One run of `fit`, stage after stage: probe, ranks, start, γ, training, proof, adapter."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gora_serve
from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.format import write_adapter
from gora_serve.config import FitConfig
from gora_serve.errors import RunError
from gora_serve.gora.gamma import GammaSearch, search_gamma
from gora_serve.gora.ranks import RankPlan, allocate_ranks, uniform_ranks
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.files import staged_folder
from gora_serve.integrity.record import binding_json
from gora_serve.progress import Listener, Progress
from gora_serve.training import inject
from gora_serve.training.data import Dataset, schedule
from gora_serve.training.encode import Example
from gora_serve.training.loop import evaluate, train
from gora_serve.training.probe_files import write_probe
from gora_serve.training.probe_run import probe_session
from gora_serve.training.run_files import RUN_SCHEMA, ranks_json
from gora_serve.training.run_folder import RunFolder
from gora_serve.training.session import LazyBatch, Session, check_untouched, versions


@dataclass(frozen=True)
class FitResult:
    """A finished run: where it lies, what was trained, and the losses (per token; None where not measured).

    quantization: of a base in 4 bits, what run.json records of it.
    """

    folder: Path
    adapter: Adapter
    plan: RankPlan
    gamma: float | None
    losses: Mapping[str, float]
    seconds: Mapping[str, float]
    data: Dataset
    base_after: Mapping[str, Any]
    quantization: Mapping[str, Any] | None = None


class Run:
    """One call of `fit`: the inputs that every stage needs, and the stages in their order."""

    def __init__(
        self, session: Session, config: FitConfig, folder: RunFolder, held_out: Dataset | None, listen: Listener
    ) -> None:
        self.session, self.config, self.folder = session, config, folder
        self.held_out, self.listen = held_out, listen
        self.seconds: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def note(self, **facts: object) -> None:
        """Write run.json: the settings and inputs, and how the run stands."""
        self.folder.json(
            "run.json",
            {
                "schema": RUN_SCHEMA,
                **facts,
                "base": self.session.base_record,
                "memory_root": self.session.memory,
                "data": self.session.data.summary(),
                "eval_data": self.held_out.summary() if self.held_out else None,
                "config": asdict(self.config),
                "processes": self.session.accelerator.num_processes,
                "device": str(self.session.accelerator.device),
                "versions": versions(),
            },
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started

    def stages(self, shapes: Mapping[str, tuple[int, int]], given: RankPlan | None, output: Path) -> FitResult:
        plan, factors, gamma, search_rows = self.prepare(shapes, given)
        self.folder.json("ranks.json", ranks_json(plan))
        model = inject.attach(
            self.session.model,
            factors,
            task_type=self.session.task_type,
            fan_in_fan_out=self.session.fan_in_fan_out,
        )
        if gamma is None:
            gamma = self.search(model, search_rows)
        with self.timed("train"):
            self.train(model)
        adapter = inject.extract(
            model,
            base=BaseId(self.session.base.name, self.session.base.revision, self.session.manifest.roots),
            origin=self.origin(gamma, plan),
            task_type=self.session.task_type,
            fan_in_fan_out=self.session.fan_in_fan_out,
        )
        with self.timed("verify"):
            base_after = check_untouched(self.session, inject.detach(model), listen=self.listen)
        self.publish(adapter)
        used = gamma if self.config.train.method == "gora" else None
        data, quantization = self.session.data, self.session.quantization
        return FitResult(output, adapter, plan, used, self.losses, self.seconds, data, base_after, quantization)

    def prepare(
        self, shapes: Mapping[str, tuple[int, int]], given: RankPlan | None
    ) -> tuple[RankPlan, dict[str, LoraFactors], float | None, tuple[Example, ...]]:
        """Return the ranks and the starting adapter. γ None means: at γ = 1, to be searched."""
        config = self.config
        if config.train.method == "lora":
            plan = given or uniform_ranks(shapes, config.ranks)
            generator = torch.Generator().manual_seed(config.train.seed)
            return plan, inject.lora_factors(plan, alpha=config.init.alpha, generator=generator), 0.0, ()
        probe_rows, search_rows = split_rows(self.session.data.examples, config)
        with self.timed("probe"):
            statistics = self.probe(probe_rows, max(config.ranks.highest, given.rank_max if given else 0))
        plan = given or allocate_ranks(statistics.importances(config.probe.importance[0]), shapes, config.ranks)
        gamma = None if config.init.gamma == "auto" else config.init.gamma
        factors = inject.gora_factors(statistics, plan, gamma=1.0 if gamma is None else gamma, alpha=config.init.alpha)
        return plan, factors, gamma, search_rows

    def probe(self, rows: tuple[Example, ...], rank_max: int) -> GradientStatistics:
        config = self.config
        statistics = probe_session(
            self.session, rows, config.probe, config.ranks, rank_max=rank_max, listen=self.listen
        )
        if self.folder.path:
            (self.folder.path / "probe").mkdir()
            write_probe(self.folder.path / "probe", statistics, self.session.base_record, self.config.probe.importance)
        return statistics

    def search(self, model: nn.Module, rows: tuple[Example, ...]) -> float:
        """Search γ on rows that the probe has not seen, then set it."""
        batches = self.session.in_order(rows)
        tried: list[float] = []

        def loss_at(gamma: float) -> float:
            with inject.scaled(model, gamma):
                loss = evaluate(model, batches, accelerator=self.session.accelerator)
            tried.append(gamma)
            self.listen(Progress("gamma", len(tried), len(tried) + 1, {"gamma": gamma, "loss": loss}))
            return loss

        with self.timed("gamma"):
            found = search_gamma(loss_at)
        _check_loss(found.base_loss, "the base's loss on the rows of the gamma search", code="GS-703")
        inject.multiply_B(model, found.gamma)
        self.folder.json("gamma.json", _gamma_json(found, len(rows)))
        return found.gamma

    def train(self, model: nn.Module) -> None:
        session, config = self.session, self.config.train
        rows = session.data.examples
        per_step = session.batch_size * config.grad_accum * session.accelerator.num_processes
        steps = config.steps or -(-int(len(rows) * (config.epochs or 1.0)) // per_step) or 1
        micro = steps * config.grad_accum * session.accelerator.num_processes
        indices = schedule(len(rows), session.batch_size, batches=micro, seed=config.seed)
        torch.manual_seed(config.seed)
        self.evaluate(model, "start", 0)
        train(
            model,
            session.batches(rows, indices),
            accelerator=session.accelerator,
            config=config,
            record=lambda numbers: self.folder.line("metrics.jsonl", numbers),
            after_step=lambda step: self.after_step(model, step, steps),
            listen=self.listen,
        )

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        every = self.config.train.eval_every
        if step == steps:
            self.evaluate(model, "end", step)
        elif every and step % every == 0:
            self.evaluate(model, f"step {step}", step)

    def evaluate(self, model: nn.Module, name: str, step: int) -> None:
        """Measure the loss on the evaluation data, if there is any; at the start also the base's own."""
        if self.held_out is None:
            return
        batches: list[LazyBatch] = self.session.in_order(self.held_out.examples)
        accelerator = self.session.accelerator
        if name == "start":
            with inject.scaled(model, 0.0):
                self.losses["base"] = evaluate(model, batches, accelerator=accelerator)
            _check_loss(self.losses["base"], "the base's loss on the evaluation data", code="GS-704")
            self.folder.line("metrics.jsonl", {"step": step, "base_eval_loss": self.losses["base"]})
        self.losses[name] = evaluate(model, batches, accelerator=accelerator)
        _check_loss(self.losses[name], f"the loss on the evaluation data at step {step}", code="GS-704")
        self.folder.line("metrics.jsonl", {"step": step, "eval_loss": self.losses[name]})

    def origin(self, gamma: float, plan: RankPlan) -> dict[str, str]:
        """What the adapter says of itself: enough to know how it was made. Equal runs give equal text."""
        config, quantization = self.config, self.session.quantization
        settings = {
            "alpha": config.init.alpha,
            "gamma": gamma,
            "rank": plan.rank,
            "rank_min": plan.rank_min,
            "rank_max": plan.rank_max,
            "rank_rule": plan.rule,
            **asdict(config.model),
            **asdict(config.data),
            "probe_steps": config.probe.steps,
            "importance": config.probe.importance[0],
            **asdict(config.train),
            "lr_ratio": config.train.ratio,
        }
        return {
            "method": config.train.method,
            "parameters": str(plan.parameters),
            "tool": f"gora-serve {gora_serve.__version__}",
            "data": self.session.data.name,
            "data_sha256": self.session.data.digest,
            "settings": json.dumps(settings, sort_keys=True),
            **({"trained_on": json.dumps(quantization, sort_keys=True)} if quantization else {}),
        }

    def publish(self, adapter: Adapter) -> None:
        """Write adapter/ in native form; it appears whole, after the base has been proved untouched."""
        if self.folder.path is None:
            return
        _check_adapter_finite(adapter)
        with staged_folder(self.folder.path / "adapter") as stage:
            root = write_adapter(stage, adapter, "native")
            base = adapter.base
            binding = binding_json(base.name, base.revision, base.roots)
            seal_folder(stage, {"adapter_root": root, "binding": binding})


def split_rows(rows: tuple[Example, ...], config: FitConfig) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return (rows to probe, rows to search γ on): apart, unless there are too few rows to part.

    The search gets search_batches micro-batches, at most a fifth of the rows, spread over the file.
    """
    if config.init.gamma != "auto":
        return rows, ()
    wanted = min(config.init.search_batches * config.data.batch_size, len(rows) // 5)
    if wanted == 0:
        return rows, rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.train.seed)).tolist()
    chosen = set(order[:wanted])
    return (
        tuple(row for i, row in enumerate(rows) if i not in chosen),
        tuple(row for i, row in enumerate(rows) if i in chosen),
    )


def _check_loss(loss: float, what: str, *, code: str) -> None:
    if not math.isfinite(loss):
        raise RunError(
            f"{what} is {loss}", code=code, kept="no adapter was written",
            hint="look at the rows of that file, or load the base with --dtype float32",
        )  # fmt: skip


def _gamma_json(found: GammaSearch, rows: int) -> dict[str, Any]:
    return {
        "schema": "gora-serve/gamma/1",
        "gamma": found.gamma,
        "base_loss": found.base_loss,
        "loss": found.loss,
        "rows": rows,
        "tried": [{"gamma": gamma, "loss": str(loss) if loss == float("inf") else loss} for gamma, loss in found.tried],
    }


def _check_adapter_finite(adapter: Adapter) -> None:
    for path, factors in adapter.modules.items():
        if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
            raise RunError(
                "the trained adapter holds NaN or infinite values", code="GS-705", tensor=path, hint="lower --lr"
            )
