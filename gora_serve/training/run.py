"""One run of `fit`, stage after stage: probe, ranks, start, γ, training, proof, adapter."""

from __future__ import annotations

import json
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
from gora_serve.config import FREE_SETTINGS, FitConfig, ModelConfig, TrainConfig
from gora_serve.errors import RunError
from gora_serve.gora.gamma import MOST_CALLS, GammaSearch, search_gamma
from gora_serve.gora.ranks import RankPlan, allocate_ranks, uniform_ranks
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.files import staged_folder
from gora_serve.integrity.record import binding_json
from gora_serve.progress import Listener, Progress
from gora_serve.training import inject
from gora_serve.training.data import Dataset
from gora_serve.training.encode import Example
from gora_serve.training.loop import evaluate
from gora_serve.training.probe_files import write_probe
from gora_serve.training.probe_run import probe_session
from gora_serve.training.resume import (
    NOTHING,
    RUN,
    Left,
    check_gamma,
    check_ranks,
    digest_of_ranks,
    digests,
    pick_up,
    seal_gamma,
)
from gora_serve.training.run_files import GAMMA_SCHEMA, RUN_SCHEMA, ranks_json
from gora_serve.training.run_folder import RunFolder
from gora_serve.training.session import Session, check_untouched, versions
from gora_serve.training.train_stage import Stop, TrainStage, check_loss


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
        self,
        session: Session,
        config: FitConfig,
        folder: RunFolder,
        *,
        held_out: Dataset | None,
        given: RankPlan | None,
        stop: Stop,
        listen: Listener,
    ) -> None:
        self.session, self.config, self.folder = session, config, folder
        self.held_out, self.given, self.stop, self.listen = held_out, given, stop, listen
        self.left: Left = NOTHING
        self.seconds: dict[str, float] = {}

    def resume(self) -> None:
        """Take over what the unfinished run left. All processes read it, and none writes before all have."""
        self.session.accelerator.wait_for_everyone()
        self.left = pick_up(self.folder.path, self.facts(), self.session.manifest.tensors)
        self.session.accelerator.wait_for_everyone()

    def facts(self) -> dict[str, Any]:
        """Return the settings and inputs, as run.json records them."""
        return {
            "base": self.session.base_record,
            "memory_root": self.session.memory,
            "data": self.session.data.summary(),
            "eval_data": self.held_out.summary() if self.held_out else None,
            "ranks_file": digest_of_ranks(self.given),
            "config": asdict(self.config),
            "processes": self.session.accelerator.num_processes,
            "mixed_precision": self.session.accelerator.mixed_precision,
            "device": str(self.session.accelerator.device),
            "versions": versions(),
        }

    def note(self, **facts: object) -> None:
        """Write run.json: the settings and inputs, and how the run stands."""
        resumed = {"resumed_from": self.left.checkpoint.position.step} if self.left.checkpoint else {}
        self.folder.json(RUN, {"schema": RUN_SCHEMA, **facts, **resumed, **self.facts()})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started

    def stages(self, shapes: Mapping[str, tuple[int, int]], output: Path) -> FitResult:
        plan, factors, gamma, search_rows = self.prepare(shapes)
        check_ranks(self.left, plan, self.folder.path)
        self.folder.json("ranks.json", ranks_json(plan))
        model = inject.attach(
            self.session.model,
            factors,
            task_type=self.session.task_type,
            fan_in_fan_out=self.session.fan_in_fan_out,
        )
        if gamma is None:
            gamma = self.search(model, search_rows)
        check_gamma(self.left, gamma, self.folder.path)
        training = TrainStage(
            self.session, self.config.train, self.folder, self.held_out, checkpoint=self.left.checkpoint,
            inputs={**digests(self.facts()), "gamma": gamma}, stop=self.stop, listen=self.listen,
        )  # fmt: skip
        before = training.evaluating  # of the processes that this one goes on from
        with self.timed("train"):
            training.run(model)
        self.seconds["train"] -= training.evaluating - before
        if self.held_out is not None:
            self.seconds["evaluate"] = training.evaluating
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
        return FitResult(output, adapter, plan, used, training.losses, self.seconds, data, base_after, quantization)

    def prepare(
        self, shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[RankPlan, dict[str, LoraFactors], float | None, tuple[Example, ...]]:
        """Return the ranks and the starting adapter. γ None means: at γ = 1, to be searched."""
        config, given = self.config, self.given
        if config.train.method == "lora":
            plan = given or uniform_ranks(shapes, config.ranks)
            generator = torch.Generator().manual_seed(config.train.seed)
            return plan, inject.lora_factors(plan, alpha=config.init.alpha, generator=generator), 0.0, ()
        probe_rows, search_rows = split_rows(self.session.data.examples, config)
        statistics = self.left.statistics
        if statistics is None:
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
        if self.folder.writes:
            with staged_folder(self.folder.path / "probe", overwrite=True) as stage:
                write_probe(stage, statistics, self.session.base_record, config.probe.importance)
                seal_folder(stage, {})
        return statistics

    def search(self, model: nn.Module, rows: tuple[Example, ...]) -> float:
        """Search γ on rows that the probe has not seen, then set it. A search that was finished is not repeated."""
        if self.left.gamma is not None:
            inject.multiply_B(model, self.left.gamma)
            return self.left.gamma
        batches = self.session.in_order(rows)
        tried: list[float] = []

        def loss_at(gamma: float) -> float:
            with inject.scaled(model, gamma):
                loss = evaluate(model, batches, accelerator=self.session.accelerator)
            tried.append(gamma)
            self.listen(Progress("gamma", len(tried), MOST_CALLS, {"gamma": gamma, "loss": loss}))
            return loss

        with self.timed("gamma"):
            found = search_gamma(loss_at)
        check_loss(found.base_loss, "the base's loss on the rows of the gamma search", code="GS-703")
        inject.multiply_B(model, found.gamma)
        content = _gamma_json(found, len(rows))
        self.folder.json("gamma.json", {**content, "seal": seal_gamma(content, digests(self.facts()))})
        return found.gamma

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
            **_decisive("model", config.model),
            **{name: value for name, value in asdict(config.data).items() if value is not None},
            **{f"probe_{name}": getattr(config.probe, name) for name in ("steps", "mode", "error", "lr")},
            "importance": config.probe.importance[0],
            "search_batches": config.init.search_batches,
            "processes": self.session.accelerator.num_processes,
            **_decisive("train", config.train),
            "mixed_precision": self.session.accelerator.mixed_precision,
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
        if not self.folder.writes:
            return
        _check_adapter_finite(adapter)
        with staged_folder(self.folder.path / "adapter", overwrite=True) as stage:
            root = write_adapter(stage, adapter, "native")
            base = adapter.base
            binding = binding_json(base.name, base.revision, base.roots)
            seal_folder(stage, {"adapter_root": root, "binding": binding})


def _decisive(stage: str, config: ModelConfig | TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if f"{stage}.{name}" not in FREE_SETTINGS}


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


def _gamma_json(found: GammaSearch, rows: int) -> dict[str, Any]:
    return {
        "schema": GAMMA_SCHEMA,
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
