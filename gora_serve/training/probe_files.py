"""A probe on disk: probe.json for people and rank allocation, statistics.safetensors for the initialisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gora_serve.config import Importance
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.integrity.files import write_json
from gora_serve.training.run_files import PROBE_SCHEMA


def probe_json(
    statistics: GradientStatistics, base: Mapping[str, Any], importance: tuple[Importance, ...]
) -> dict[str, Any]:
    """Return the content of probe.json. The first metric of `importance` is the one that decides ranks."""
    metric, *others = importance
    modules = {}
    for path, module in statistics.modules.items():
        entry: dict[str, Any] = {"shape": list(module.shape), "importance": module.importance[metric]}
        if others:
            entry["others"] = {name: module.importance[name] for name in others}
        modules[path] = entry | {"gradient_norm": module.gradient_norm}
        if statistics.mode == "sketch":
            modules[path] |= {"importance_error": module.importance_error, "rows": module.rows}
    return {
        "schema": PROBE_SCHEMA,
        "base": dict(base),
        "mode": statistics.mode,
        "metric": metric,
        "steps": statistics.steps,
        "samples": statistics.samples,
        "tokens": statistics.tokens,
        "loss": statistics.loss,
        "stopped_early": statistics.stopped_early,
        "modules": modules,
    }


def write_probe(
    folder: Path,
    statistics: GradientStatistics,
    base: Mapping[str, Any],
    importance: tuple[Importance, ...],
) -> None:
    """Write both files of a probe into an existing folder. Tensors: <path>.A (k, in), <path>.compressed (out, k)."""
    tensors: dict[str, Tensor] = {}
    for path, module in statistics.modules.items():
        tensors[f"{path}.A"] = module.A.contiguous()
        tensors[f"{path}.compressed"] = module.compressed.contiguous()
    save_file(tensors, folder / "statistics.safetensors")
    write_json(folder / "probe.json", probe_json(statistics, base, importance))
