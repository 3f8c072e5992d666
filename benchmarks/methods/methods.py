"""The methods: what each makes of a loaded base before training, and what is special about its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gora_serve.config import FitConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.gora.gamma import search_gamma
from gora_serve.gora.ranks import allocate_ranks, uniform_ranks
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.progress import silent
from gora_serve.training import inject
from gora_serve.training.encode import Example
from gora_serve.training.loop import evaluate
from gora_serve.training.loss import mean_loss
from gora_serve.training.probe_run import probe_session
from gora_serve.training.run import split_rows
from gora_serve.training.session import LazyBatch, Session
from gora_serve.training.weights import weight_shape

RANK, ALPHA = 8, 16.0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ESTIMATE = 8  # micro-batches that EVA, CorDA and LoRA-GA look at
# Small sweeps, of the same number for every method; run.py goes on beyond an edge at which one has its best.
FULL_RATES, LORA_RATES, RATIO_RATES = (2e-5, 5e-5, 1e-4, 2e-4), (5e-4, 1e-3, 2e-3, 4e-3), (5e-5, 1e-4, 2e-4, 4e-4)

Start = Callable[[Session, list[LazyBatch]], tuple[nn.Module, dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """start: loaded base and batches to estimate from -> what is trained, and what is noted of it.

    rates: learning rates of the sweep. ratio: of B's learning rate to A's. initial: its initialisation edits the base,
    so its initial adapter is kept for conversion. quantize: the base is loaded in 4 bits. adapts: ranks change while it
    trains (AdaLoRA). like: whose learning rate it takes, for ablations.
    """

    name: str
    start: Start
    rates: tuple[float, ...] = LORA_RATES
    ratio: float = 1.0
    initial: bool = False
    quantize: bool = False
    adapts: bool = False
    like: str | None = None


def full(session: Session, batches: list[LazyBatch]) -> tuple[nn.Module, dict[str, Any]]:
    for parameter in session.model.parameters():
        parameter.requires_grad_(True)
    return session.model, {}


def peft_method(prepare: Callable[[Session, Any, list[LazyBatch]], None] | None = None, **settings: Any) -> Start:
    """Return the start of a method that PEFT has; `prepare` does what comes before its layers are made."""

    def start(session: Session, batches: list[LazyBatch]) -> tuple[nn.Module, dict[str, Any]]:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(**{"r": RANK, "lora_alpha": int(ALPHA), "target_modules": LINEAR} | settings)
        if prepare is not None:
            prepare(session, config, batches)
        return get_peft_model(session.model, config), {}  # type: ignore[arg-type]

    return start


def adalora(steps: int) -> Start:
    def start(session: Session, batches: list[LazyBatch]) -> tuple[nn.Module, dict[str, Any]]:
        from peft import AdaLoraConfig, get_peft_model

        config = AdaLoraConfig(
            init_r=RANK * 3 // 2, target_r=RANK, tinit=steps // 10, tfinal=steps // 5, deltaT=max(1, steps // 40),
            total_step=steps, lora_alpha=int(ALPHA), target_modules=LINEAR,
        )  # fmt: skip
        return get_peft_model(session.model, config), {}  # type: ignore[arg-type]

    return start


def lora_ga(session: Session, config: Any, batches: list[LazyBatch]) -> None:
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    def run() -> None:
        for batch in batches:
            with session.accelerator.autocast():
                loss = mean_loss(session.model, batch())
            loss.backward()  # type: ignore[no-untyped-call]

    config.lora_ga_config = LoraGAConfig()
    preprocess_loraga(session.model, config, run)
    session.model.zero_grad(set_to_none=True)


def corda(session: Session, config: Any, batches: list[LazyBatch]) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for batch in batches:
            for row in rows_of(batch()):  # it takes no batches of more
                session.model(**row)

    config.corda_config = CordaConfig(corda_method="ipm")
    preprocess_corda(session.model, config, torch.no_grad()(run))


def rows_of(batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a batch's rows one by one, without padding."""
    for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield {"input_ids": ids[: keep.sum()][None]}


def eva(session: Session, batches: list[LazyBatch]) -> tuple[nn.Module, dict[str, Any]]:
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    config = LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), target_modules=LINEAR, init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, use_label_mask=False),
    )  # fmt: skip
    model: Any = get_peft_model(session.model, config)  # type: ignore[arg-type]
    given = [{name: tensor for name, tensor in one().items() if name != "labels"} for one in batches]
    initialize_lora_eva_weights(model, given, show_progress_bar=False)
    return model, {}


def milora(session: Session, batches: list[LazyBatch]) -> tuple[nn.Module, dict[str, Any]]:
    """The smallest singular values (Wang et al. 2025), which PEFT does not have: taken out of the base as PiSSA's."""
    model, noted = peft_method()(session, batches)
    with torch.no_grad():
        for layer in inject.lora_layers(model).values():
            weight, scale = layer.get_base_layer().weight, layer.scaling[inject.NAME]
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            root = (values[-RANK:] / scale).sqrt()
            layer.lora_A[inject.NAME].weight.copy_(root[:, None] * right[-RANK:])
            layer.lora_B[inject.NAME].weight.copy_(left[:, -RANK:] * root)
            part = layer.lora_B[inject.NAME].weight.double() @ layer.lora_A[inject.NAME].weight.double()
            weight.sub_((scale * part).to(weight.dtype))
    return model, noted


@dataclass
class Probes:
    """The last probe's statistics: variants of GoRA that differ after the probe share it."""

    _last: tuple[Any, GradientStatistics] | None = None

    def of(
        self, session: Session, rows: Sequence[Example], probe: ProbeConfig, ranks: RankConfig
    ) -> tuple[GradientStatistics, bool]:
        """Return the probe's statistics, and whether they were there."""
        bounds = ranks if probe.steps == "auto" else ranks.highest
        key = (id(session.data), session.seed, session.quantization is None, probe, bounds)
        if self._last is not None and self._last[0] == key:
            return self._last[1], True
        self.forget()  # before the next is made: each may be large
        statistics = probe_session(session, rows, probe, ranks, rank_max=ranks.highest, listen=silent)
        self._last = key, statistics
        return statistics, False

    def forget(self) -> None:
        self._last = None


@dataclass(frozen=True)
class Gora:
    """GoRA by the library's own stages. sign: -1 ascends, as the reference implementation does (table 6)."""

    probes: Probes = field(compare=False)
    ranks: RankConfig = field(default_factory=lambda: RankConfig(rank=RANK))
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(steps=32))
    gamma: float | str = "auto"
    sign: int = 1
    uniform: bool = False

    def __call__(self, session: Session, batches: list[LazyBatch]) -> tuple[nn.Module, dict[str, Any]]:
        seeded = FitConfig(train=TrainConfig(seed=session.seed))
        probed, searched = split_rows(session.data.examples, seeded)  # the same rows where γ is given
        statistics, shared = self.probes.of(session, probed, self.probe, self.ranks)
        shapes = {path: weight_shape(module) for path, module in session.modules.items()}
        importances = statistics.importances(self.probe.importance[0])
        plan = uniform_ranks(shapes, self.ranks) if self.uniform else allocate_ranks(importances, shapes, self.ranks)
        given = 1.0 if self.gamma == "auto" else float(self.gamma)
        factors = inject.gora_factors(statistics, plan, gamma=self.sign * given, alpha=ALPHA)
        model = inject.attach(session.model, factors, task_type=session.task_type, fan_in_fan_out=False)
        if self.gamma == "auto":
            given = self._search(session, model, replace(session, batch_size=16).in_order(searched))
        ranks = list(plan.ranks.values())
        return model, {
            "gamma": given, "steps probed": statistics.steps, "probe shared": shared, "ranks": [min(ranks), max(ranks)],
        }  # fmt: skip

    def _search(self, session: Session, model: nn.Module, batches: list[LazyBatch]) -> float:
        def loss_at(gamma: float) -> float:
            with inject.scaled(model, gamma):
                return evaluate(model, batches, accelerator=session.accelerator)

        found = search_gamma(loss_at).gamma
        inject.multiply_B(model, found)
        return found


def methods(steps: int, probes: Probes | None = None) -> Mapping[str, Method]:
    """Return all methods; steps: of the training, which AdaLoRA's schedule needs; probes: what GoRA's share."""
    gora = Gora(probes or Probes())
    found = [
        Method("full", full, FULL_RATES),
        Method("lora", peft_method()),
        Method("rslora", peft_method(use_rslora=True)),
        Method("lora+", peft_method(), RATIO_RATES, 16.0),
        Method("rslora+", peft_method(use_rslora=True), RATIO_RATES, 16.0),
        Method("dora", peft_method(use_dora=True)),
        Method("pissa", peft_method(init_lora_weights="pissa_niter_16"), initial=True),
        Method("olora", peft_method(init_lora_weights="olora"), initial=True),
        Method("milora", milora, initial=True),
        Method("eva", eva),
        Method("corda", peft_method(corda, init_lora_weights="corda"), initial=True),
        Method("lora-ga", peft_method(lora_ga, init_lora_weights="lora_ga"), initial=True),
        Method("adalora", adalora(steps), adapts=True),
        Method("gora", gora, RATIO_RATES, 16.0),
        Method("gora-ratio-4", gora, tuple(lr / 2 for lr in LORA_RATES), 4.0),
        Method("gora-ratio-1", gora, LORA_RATES),
        Method("gora-32", replace(gora, ranks=RankConfig(rank=32)), RATIO_RATES, 16.0),
        Method("lora-32", peft_method(r=32, lora_alpha=64)),
        *variants(gora, ProbeConfig(steps=32)),
    ]
    return {method.name: method for method in found}


def variants(gora: Gora, probe: ProbeConfig) -> list[Method]:
    """At GoRA's learning rate: its other rules and modes, the ablations of the paper's tables 5 and 6, and what the
    reviews asked for. Those that share a probe stand together."""
    others = {
        "gora-exact": replace(gora, ranks=RankConfig(rank=RANK, rule="exact")),
        "gora-uniform": replace(gora, uniform=True),
        "gora-gamma-0": replace(gora, gamma=0.0),
        "gora-gamma-0.05": replace(gora, gamma=0.05),
        "gora-gamma-0.3": replace(gora, gamma=0.3),
        "gora-ascent": replace(gora, gamma=0.05, sign=-1),
        "gora-4-16": replace(gora, ranks=RankConfig(rank=RANK, rank_min=4, rank_max=16)),
        "gora-1-64": replace(gora, ranks=RankConfig(rank=RANK, rank_min=1, rank_max=64)),
        "gora-nuclear": replace(gora, probe=replace(probe, importance=("sensitivity-nuclear",))),
        "gora-gradient-nuclear": replace(gora, probe=replace(probe, importance=("gradient-nuclear",))),
        "gora-early-stop": replace(gora, probe=replace(probe, steps="auto", longest=32)),
        "gora-sketch": replace(gora, probe=replace(probe, mode="sketch")),
        "gora-pro": replace(gora, probe=replace(probe, lr=1e-3)),
    }
    found = [Method(name, start, RATIO_RATES, 16.0, like="gora") for name, start in others.items()]
    return [*found, Method("qgora", gora, RATIO_RATES, 16.0, quantize=True, like="gora")]
