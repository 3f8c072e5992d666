"""A probe on disk: probe.json for people and rank allocation, statistics.safetensors for the initialisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from gora_serve.config import Importance
from gora_serve.errors import InputError
from gora_serve.gora.statistics import GradientStatistics, ModuleStatistics
from gora_serve.integrity.files import write_bytes, write_json
from gora_serve.training.run_files import PROBE_SCHEMA, read_probe


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
    write_bytes(folder / "statistics.safetensors", save(tensors))
    write_json(folder / "probe.json", probe_json(statistics, base, importance))


def read_statistics(folder: Path) -> GradientStatistics:
    """Read the probe that `write_probe` wrote into `folder`: the same value, with all tensors on the CPU.

    Raises InputError for a file of another kind, or where the two files do not belong together.
    """
    probe = read_probe(folder)
    tensors = load_file(folder / "statistics.safetensors")
    names = {f"{path}.{part}" for path in probe["modules"] for part in ("A", "compressed")}
    if names != tensors.keys():
        odd = sorted(names ^ tensors.keys())[0]
        raise InputError(
            "the files of the probe do not belong together",
            code="GS-394",
            hint="probe again: gora-serve probe",
            file=folder,
            tensor=odd,
        )
    modules = {
        path: ModuleStatistics(
            shape=(module["shape"][0], module["shape"][1]),
            importance={probe["metric"]: module["importance"], **module.get("others", {})},
            A=tensors[f"{path}.A"],
            compressed=tensors[f"{path}.compressed"],
            gradient_norm=module["gradient_norm"],
            importance_error=module.get("importance_error", 0.0),
            rows=module.get("rows", module["shape"][0]),
        )
        for path, module in probe["modules"].items()
    }
    numbers = (probe[name] for name in ("steps", "samples", "tokens", "loss", "stopped_early"))
    return GradientStatistics(probe["mode"], modules, *numbers)
