"""What a foreign adapter would cost if it were served as it is: read, held to its base, measured, deployment priced.

The measures themselves are `gora_serve.deploy.gap`'s, and those on data `gora_serve.training.compare`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from converters.detect import Detection
from converters.initial import IF_ROUNDED
from converters.read import held_to_base, read
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.linalg import NUMERICAL
from gora_serve.config import DataConfig, GapConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.cost import Deployment, deployments
from gora_serve.deploy.gap import STORED, Gap, Parts, measure_gap
from gora_serve.deploy.trained_on import quantization
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.manifest import hash_model
from gora_serve.serving.adapter_dir import read_adapter_dir
from gora_serve.serving.preflight import Fault, as_fault, check_adapter
from gora_serve.training.lengths import check_length, positions

if TYPE_CHECKING:
    from gora_serve.training.compare import Comparison


@dataclass(frozen=True)
class GapReport:
    """Everything that `gap` found. lay_in: what the base's weights lay in during training, and how one knows; None: as
    they are stored. comparison: of the models on data, where there is any."""

    adapter: str
    base: str
    config: GapConfig
    detection: Detection
    reading: Reading
    lay_in: tuple[str, str] | None
    gap: Gap
    costs: Sequence[Deployment]
    comparison: Comparison | None
    warnings: Sequence[str] = ()


def find_gap(
    path: Path,
    base: Base,
    config: GapConfig,
    inputs: Inputs,
    *,
    data: str | None = None,
    rows: DataConfig | None = None,
) -> GapReport:
    """Measure what serving the adapter at `path` as it is would cost on `base`, the untouched one.

    data: rows as for fit, of which the first config.max_rows are asked of the models; rows: how they are read.
    Raises UsageError (GS-205) for rows longer than the base has positions, and what `read` and `compare` raise.
    """
    rows = rows or DataConfig()
    weights = BaseWeights(base.path)
    if data is not None:
        check_length(positions(weights.config), rows)
    inputs = replace(inputs, base=weights)
    source, detection, reading = read(path, inputs, config.family)
    reading = _as_served(source, reading, base)
    manifest = partial(hash_model, base.path, listen=inputs.listen)
    warnings = held_to_base(source, detection, reading, manifest, base, inputs)
    lay_in = _lay_in(source, reading, config)
    if lay_in and lay_in[0] == "float32":
        reading = replace(reading, notes=tuple(note for note in reading.notes if note != IF_ROUNDED))
    parts = Parts(
        weights, reading.adapter.modules, reading.served, reading.initial, reading.edited, _rounder(lay_in),
        STORED.get(lay_in[0]) if lay_in else None, reading.full_rank, source.weights,
    )  # fmt: skip
    stored, tolerance = STORED[config.dtype], NUMERICAL[config.dtype]
    gap = measure_gap(parts, stored, tolerance=tolerance, listen=inputs.listen)
    comparison = None
    if data is not None:
        from gora_serve.training.compare import compare, variants_of  # brings transformers, which takes seconds

        variants = variants_of(parts, reading.adapter.carried, stored, tolerance)
        comparison = compare(base, data, parts, variants, rows=rows, max_rows=config.max_rows, listen=inputs.listen)
    costs = deployments(
        gap.modules, trained=_trained(source, reading), itemsize=stored.itemsize, tasks=config.tasks,
        base_bytes=sum(entry.nbytes for entry in weights.tensors.entries.values()),
    )  # fmt: skip
    return GapReport(str(path), base.name, config, detection, reading, lay_in, gap, costs, comparison, warnings)


def _as_served(source: Source, reading: Reading, base: Base) -> Reading:
    """Return the reading as one that no engine loads, where `serve` refuses the files as they are.

    That an initialisation edited the base is not asked of them: the error that it leaves is measured.
    """
    if reading.served is None:
        return reading
    faults = [fault for fault in _faults(source, base) if fault.key != "init_lora_weights" or reading.initial is None]
    if not faults:
        return reading
    return replace(reading, served=None, notes=(*reading.notes, f"serve refuses it as it is: {faults[0]}"))


def _faults(source: Source, base: Base) -> Sequence[Fault]:
    try:
        return check_adapter(read_adapter_dir(source.folder.name, source.folder), base.path)
    except GoraError as err:  # pickles, another name of the file
        return (as_fault(err, source.folder),)


def _lay_in(source: Source, reading: Reading, config: GapConfig) -> tuple[str, str] | None:
    if config.trained_on == "auto":
        return quantization(source.tensors.metadata, reading.adapter.base.name, source.weights)
    return None if config.trained_on == "stored" else (config.trained_on, "--trained-on says so")


def _rounder(lay_in: tuple[str, str] | None) -> Callable[[Tensor], Tensor] | None:
    """What rounds a weight to 4 bits, where the base lay in them; None elsewhere."""
    if lay_in is None or lay_in[0] != "nf4":
        return None
    from gora_serve.training.quantize import nf4_rounder

    return nf4_rounder()


def _trained(source: Source, reading: Reading) -> int:
    """Return the number of parameters of an adapter as it was trained; 0 for one of full rank."""
    return 0 if reading.full_rank else sum(math.prod(source.tensors.shape(name)) for name in reading.applied)
