"""`conversion.json`: what went in, by digest, what was done with each tensor, and how exact the result is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gora_serve
from converters.detect import Detection
from converters.reading import Inputs, Reading
from converters.source import CONFIG, Source
from gora_serve.adapter.factors import BaseId
from gora_serve.config import ConvertConfig
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.record import binding_json

RECEIPT = "conversion.json"
SCHEMA = "gora-serve/conversion/1"


@dataclass(frozen=True)
class ModuleError:
    """One module of the output. rank: as written; 0 where the module is left out. full_rank: the numerical rank before.

    norm: |dW| of the exact update. truncated: what the lower rank leaves out. error: exact less written, rounding and
    all. The three are Frobenius norms.
    """

    rank: int
    full_rank: int
    norm: float
    truncated: float
    error: float


@dataclass(frozen=True)
class Converted:
    """What was written, and how far it is from the exact update."""

    folder: Path
    root: str
    detection: Detection
    reading: Reading
    base: BaseId
    origin: Mapping[str, str]
    modules: Mapping[str, ModuleError]
    receipt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative error of the whole adapter, Frobenius over all modules together."""
        return _relative(self.modules.values(), "error")

    @property
    def truncated(self) -> float:
        """The part of it that truncation caused."""
        return _relative(self.modules.values(), "truncated")


def _relative(modules: Iterable[ModuleError], name: str) -> float:
    rows = [asdict(module) for module in modules]
    norm = float(sum(row["norm"] ** 2 for row in rows) ** 0.5)
    return float(sum(row[name] ** 2 for row in rows) ** 0.5) / norm if norm else 0.0


def make_receipt(source: Source, done: Converted, config: ConvertConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the content of conversion.json: the same inputs give the same text."""
    base, reading = done.base, done.reading
    return {
        "schema": SCHEMA,
        "tool": f"gora-serve {gora_serve.__version__}",
        "family": done.detection.family,
        "evidence": list(done.detection.evidence),
        "confidence": done.detection.confidence,
        "method": reading.method,
        "notes": list(reading.notes),
        "settings": asdict(config),
        "inputs": _inputs(source, inputs),
        "base": binding_json(base.name, base.revision, base.roots),
        "adapter_root": done.root,
        "error": done.error,
        "truncated": done.truncated,
        "modules": {path: asdict(module) for path, module in done.modules.items()},
        "tensors": {
            "applied": sorted(reading.applied),
            "carried": sorted(reading.carried),
            "without_effect": dict(sorted(reading.known.items())),
        },
    }


def _inputs(source: Source, inputs: Inputs) -> dict[str, Any]:
    """Name and SHA-256 of each file that was read; a folder's weights and configuration."""
    files: dict[str, Any] = {"adapter": _digests(*source.files, source.config_file)}
    if inputs.init_adapter is not None:
        files["init_adapter"] = _digests(*_files_of(inputs.init_adapter))
    if inputs.mutated_base is not None:
        files["mutated_base"] = _digests(*_files_of(inputs.mutated_base))
    if inputs.cache is not None:
        files["cache"] = _digests(inputs.cache)
    return files


def _files_of(path: Path) -> list[Path]:
    return [*sorted(path.glob("*.safetensors")), path / CONFIG] if path.is_dir() else [path]


def _digests(*files: Path) -> dict[str, str]:
    return {str(file): sha256_file(file)[1] for file in files if file.is_file()}
