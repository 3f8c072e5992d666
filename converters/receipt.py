"""`conversion.json`: what went in, by digest, what was done with each tensor, and how exact the result is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gora_serve
from converters.detect import Detection
from converters.reading import Reading
from converters.source import CONFIG, PICKLED, Source
from gora_serve.adapter.factors import BaseId
from gora_serve.adapter.measure import Measured, ModuleError
from gora_serve.config import ConvertConfig
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.record import binding_json

RECEIPT = "conversion.json"
SCHEMA = "gora-serve/conversion/1"


@dataclass(frozen=True)
class Converted(Measured):
    """What was written, and how far it is from the exact update."""

    folder: Path
    root: str
    detection: Detection
    reading: Reading
    base: BaseId
    origin: Mapping[str, str]
    modules: Mapping[str, ModuleError]
    receipt: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def make_receipt(source: Source, done: Converted, config: ConvertConfig) -> dict[str, Any]:
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
        "inputs": _inputs(source, reading),
        "base": binding_json(base.name, base.revision, base.roots, asserted=base.asserted),
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


def _inputs(source: Source, reading: Reading) -> dict[str, Any]:
    """Name and SHA-256 of each file that was read: the adapter's own, and what the reader needed beside them."""
    own = [*source.files, source.config_file]
    others = [file for file in files_read(source, reading) if file not in own]
    return {"adapter": _digests(*own), "others": _digests(*others)}


def files_read(source: Source, reading: Reading) -> list[Path]:
    """Return every file that the reading rests on, but those of the base."""
    others = [file for path in reading.files for file in _files_of(path)]
    return [file for file in (*source.files, source.config_file, *others) if file.is_file()]


def _files_of(path: Path) -> list[Path]:
    """Return the weights and the configuration in a folder, or the file itself."""
    if path.is_file():
        return [path]
    weights = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", *PICKLED)]
    return [*weights, path / CONFIG, path / "config.json"]


def _digests(*files: Path) -> dict[str, str]:
    return {str(file): sha256_file(file)[1] for file in files if file.is_file()}
