"""PEFT's LoRA layers on a model: attach an adapter for training, scale it for the γ search, take it out again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.peft_config import make_config
from gora_serve.errors import UsageError
from gora_serve.gora.initialize import draw_A, initialize, rank_stabilized_scale
from gora_serve.gora.ranks import RankPlan
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.training.weights import execution_device

NAME = "default"  # PEFT's name of the one adapter that is trained


def gora_factors(
    statistics: GradientStatistics, plan: RankPlan, *, gamma: float, alpha: float
) -> dict[str, LoraFactors]:
    """Return the starting adapter of GoRA: one gradient step of size γ, compressed. Rank 0 means no entry."""
    return {
        path: LoraFactors(
            *initialize(module.A, module.compressed, rank=plan.ranks[path], gamma=gamma, alpha=alpha),
            rank_stabilized_scale(alpha, plan.ranks[path]),
        )
        for path, module in statistics.modules.items()
        if plan.ranks[path] > 0
    }


def lora_factors(plan: RankPlan, *, alpha: float, generator: torch.Generator) -> dict[str, LoraFactors]:
    """Return the starting adapter of plain LoRA: A Kaiming uniform, B zero, scale alpha / r. Rank 0 means no entry."""
    factors = {}
    for path, rank in plan.ranks.items():
        if rank == 0:
            continue
        shape = plan.shapes[path]
        A = draw_A(shape, rank, generator)  # (r, in)
        factors[path] = LoraFactors(A, torch.zeros(shape[0], rank), alpha / rank)
    return factors


def check_targets(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse targets that PEFT takes for no LoRA layers, before the work that comes first. Raises UsageError."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    for name in sorted({path.rpartition(".")[2] for path in paths}):
        with _refusing():
            _check_lora_target_modules_mamba(LoraConfig(), model, name)


@contextmanager
def _refusing() -> Iterator[None]:
    """Say in our words that PEFT makes no LoRA layer of a target."""
    try:
        yield
    except ValueError as err:
        raise UsageError(
            "PEFT makes no LoRA layer of one of the targets", code="GS-210", actual=str(err),
            hint="name other modules with --targets",
        ) from err  # fmt: skip


def attach(
    model: nn.Module, factors: Mapping[str, LoraFactors], *, task_type: str | None, fan_in_fan_out: bool
) -> nn.Module:
    """Wrap the model with trainable float32 LoRA layers that hold `factors`. The base stays frozen.

    Raises UsageError for a target that PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    config = make_config(
        {path: factor.rank for path, factor in factors.items()},
        {path: factor.scale for path, factor in factors.items()},
        base_name=None,
        revision=None,
        task_type=task_type,
        fan_in_fan_out=fan_in_fan_out,
    )
    config = {key: value for key, value in config.items() if key not in ("auto_mapping", "inference_mode")}
    config["target_modules"] = "|".join(map(re.escape, factors))  # whole paths; in a list PEFT takes endings too
    with _refusing():
        peft_model: nn.Module = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for path, layer in lora_layers(peft_model).items():
            _make_real(layer)
            layer.lora_A[NAME].weight.copy_(factors[path].A)
            layer.lora_B[NAME].weight.copy_(factors[path].B)
            layer.scaling[NAME] = factors[path].scale
    return peft_model


def _make_real(layer: Any) -> None:
    """Give factors memory on the device that the layer runs on: over an offloaded weight PEFT leaves them without."""
    if layer.get_base_layer().weight.is_meta:
        device = execution_device(layer.get_base_layer())
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
            factor.to_empty(device=device).to(torch.float32)


def lora_layers(peft_model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA layers by the base model's own module paths."""
    from peft.tuners.lora import LoraLayer

    base = peft_model.get_base_model()  # type: ignore[operator]
    return {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def scaled(peft_model: nn.Module, factor: float) -> Iterator[None]:
    """While open, every update counts `factor` times; no tensor is copied. B is linear in γ, so this tries a γ."""
    layers = lora_layers(peft_model)
    before = {path: layer.scaling[NAME] for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.scaling[NAME] = before[path] * factor
        yield
    finally:
        for path, layer in layers.items():
            layer.scaling[NAME] = before[path]


def multiply_B(peft_model: nn.Module, factor: float) -> None:
    """Multiply every B by `factor`, in place: sets the chosen γ."""
    with torch.no_grad():
        for layer in lora_layers(peft_model).values():
            layer.lora_B[NAME].weight.mul_(factor)


def extract(
    peft_model: nn.Module,
    *,
    base: BaseId,
    origin: Mapping[str, str],
    task_type: str | None,
    fan_in_fan_out: bool,
) -> Adapter:
    """Return the trained adapter as a value, on the CPU, copied."""
    modules = {
        path: LoraFactors(
            layer.lora_A[NAME].weight.detach().cpu().clone(),
            layer.lora_B[NAME].weight.detach().cpu().clone(),
            float(layer.scaling[NAME]),
        )
        for path, layer in lora_layers(peft_model).items()
    }
    return Adapter(modules, base, {}, origin, task_type, fan_in_fan_out)


def detach(peft_model: nn.Module) -> nn.Module:
    """Take the LoRA layers off again, without merging, and return the base model.

    By hand, because PEFT's `unload` fetches every offloaded weight and keeps it in memory.
    """
    base: nn.Module = peft_model.get_base_model()  # type: ignore[operator]
    for path, layer in lora_layers(peft_model).items():
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base
