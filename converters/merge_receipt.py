"""`merge.json`: what went into a merged model, by digest, and what the update changed in each of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gora_serve
from converters.detect import Detection
from converters.reading import Reading
from converters.receipt import files_read
from converters.source import Source
from gora_serve.config import MergeConfig
from gora_serve.deploy.combine_files import SCHEMA
from gora_serve.deploy.merge import Written
from gora_serve.deploy.merge_values import ModelPlan
from gora_serve.integrity.bases import Base
from gora_serve.integrity.digest import weights_root
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.manifest import Roots
from gora_serve.integrity.record import binding_json
from gora_serve.integrity.roots import config_root, tokenizer_root

FAINT = 0.5  # of an update: where less than this is stored, people are told
OF_A_MODEL = ("family", "dtype", "base_as")  # settings of `merge` that mean something for a model


@dataclass(frozen=True)
class Opened:
    """One adapter that went in: where it lies, its weight, and what was understood of it."""

    path: Path
    weight: float
    source: Source
    detection: Detection
    reading: Reading

    @property
    def files(self) -> list[Path]:
        return files_read(self.source, self.reading)

    def to_json(self) -> dict[str, Any]:
        reading = self.reading
        files = {str(file): sha256_file(file)[1] for file in self.files}
        return {
            "adapter": str(self.path), "weight": self.weight, "family": self.detection.family,
            "evidence": list(self.detection.evidence), "method": reading.method, "files": files,
            "applied": sorted(reading.applied), "carried": sorted(reading.carried),
            "without_effect": dict(sorted(reading.known.items())),
        }  # fmt: skip


@dataclass(frozen=True)
class MergedModel:
    """What was written, and what it was made of."""

    folder: Path
    base: Base
    base_roots: Roots
    roots: Roots
    adapters: tuple[Opened, ...]
    plan: ModelPlan
    written: Written
    config: MergeConfig
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faint(self) -> list[str]:
        """Tensors of whose update the type holds less than half."""
        return [name for name, one in self.written.tallies.items() if one.squared_update and one.held < FAINT]


def said_of_nothing(written: Written) -> tuple[str, ...]:
    """Return the warning for a merge in which no element changed, or only by rounding to 4 bits: () for others."""
    tallies = written.tallies.values()
    changed = any(one.changed for one in tallies)
    if not any(one.squared_update for one in tallies):
        what = "nothing is added" if changed else "nothing changed"
        return (f"{what}: the update is zero (look at the weights, lora_alpha and the factors)",)
    small = "the update is too small for the type of every tensor (--dtype float32 keeps it)"
    return () if changed else (f"nothing changed: {small}",)


def merged_roots(stage: Path, written: Written) -> Roots:
    return Roots(weights_root(written.merged), config_root(stage), tokenizer_root(stage))


def make_receipt(done: MergedModel) -> dict[str, Any]:
    """Return the content of merge.json: the same inputs give the same text."""
    tallies = done.written.tallies
    changed = {} if done.plan.config is None else dict(done.plan.config)
    return {
        "schema": SCHEMA,
        "tool": f"gora-serve {gora_serve.__version__}",
        "into": "model",
        "settings": {name: value for name, value in asdict(done.config).items() if name in OF_A_MODEL},
        "base": binding_json(done.base.name, done.base.revision, done.base_roots),
        "adapters": [one.to_json() for one in done.adapters],
        "weights_root": done.roots.weights,
        "config_root": done.roots.config,
        "tokenizer_root": done.roots.tokenizer,
        "totals": totals(done),
        "tensors": {name: tally.to_json() for name, tally in tallies.items()},
        "unchanged": len(done.plan.targets) - len(tallies),
        "fresh": [target.name for target in done.plan.targets if target.fresh],
        "config": changed,
        "files": {"copied": list(done.copied), "left_out": list(done.left_out)},
        "notes": list(done.notes),
        "warnings": list(done.warnings),
    }


def totals(done: MergedModel) -> dict[str, Any]:
    """Return the same numbers over all tensors that were merged."""
    tallies = done.written.tallies.values()
    update = sum(one.squared_update for one in tallies)
    value: dict[str, Any] = {
        "tensors": len(tallies),
        "elements": sum(one.elements for one in tallies),
        "changed": sum(one.changed for one in tallies),
        "update": math.sqrt(update),
        "held": 1 + sum(one.along for one in tallies) / update if update else 1.0,
        "error": math.sqrt(sum(one.squared_error for one in tallies)),
        "max_error": max((one.max_error for one in tallies), default=0.0),
    }
    both = [one for one in tallies if one.squared_stored is not None]
    if both:
        value["error_on_stored"] = math.sqrt(sum(one.squared_stored or 0.0 for one in both))
        value["error_on_quantized"] = math.sqrt(sum(one.squared_quantized or 0.0 for one in both))
    return value
