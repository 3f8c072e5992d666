"""From a foreign checkpoint to plain LoRA on the untouched base: read, recompress, truncate, write, measure, receipt.

The same for all families. One module is in memory at a time. Of a full-rank update (DoRA, a full fine-tune) with
--rank R only the first 8 R directions of a module are computed, so that no module gets more than rank 8 R; the errors
that are stated count what lies beyond them. With --tolerance the whole spectrum is, which takes longer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from converters.detect import Detection
from converters.read import check_can_be_low_rank, held_to_base, is_asserted, read
from converters.reading import Inputs, Reading
from converters.receipt import RECEIPT, Converted, files_read, make_receipt
from converters.source import Source
from gora_serve.adapter.card import model_card
from gora_serve.adapter.engine_ranks import LARGEST_RANK
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.format import seal_record, write_adapter, written_bytes
from gora_serve.adapter.linalg import NUMERICAL, Spectrum, compress, leading
from gora_serve.adapter.measure import ModuleError, measure_written, rounded_away
from gora_serve.adapter.spill import Spill
from gora_serve.adapter.truncate import LEADING, choose_ranks
from gora_serve.config import ConvertConfig, ExportConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.stacks import level, levelled_factors
from gora_serve.deploy.update import check_carried, check_update
from gora_serve.errors import InputError, counted
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.files import staged_folder, write_json, write_text
from gora_serve.integrity.known import hash_base
from gora_serve.integrity.reading import check_unchanged, stamps
from gora_serve.integrity.space import require_space
from gora_serve.integrity.staging import check_target
from gora_serve.integrity.targets import check_is_unicode
from gora_serve.progress import Progress


def convert(
    path: Path,
    base: Base,
    output: Path,
    config: ConvertConfig | None = None,
    inputs: Inputs | None = None,
    *,
    overwrite: bool = False,
) -> Converted:
    """Write the adapter at `path` as plain LoRA on `base` into `output`, with a receipt.

    Nothing is written where anything is refused. Raises UsageError (GS-231) for a full-rank family without a rank or a
    tolerance, BindingError (GS-405) for another base's shapes, and what the family's reader raises.
    """
    config = config or ConvertConfig()
    config.validate()
    check_is_unicode(output)
    weights = BaseWeights(base.path)
    inputs = replace(inputs or Inputs(), base=weights)
    require_space(output, 0)
    with staged_folder(output, overwrite=overwrite, protect=[path, base.path, *inputs.beside]) as stage:
        source, detection, reading = read(path, inputs, config.family)
        read_from = files_read(source, reading)
        check_target(output, overwrite=overwrite, protect=read_from)  # what was found by itself is protected too
        before = stamps(read_from)
        limited = config.rank is not None or config.tolerance is not None
        check_can_be_low_rank(source, detection, reading, limited=limited)
        check_carried(weights, reading.adapter.carried, file=source.weights)
        manifest = hash_base(base.path, listen=inputs.listen)
        warnings = held_to_base(source, detection, reading, lambda: manifest, base, inputs)
        asserted = is_asserted(source, manifest.roots.weights)
        bound_to = BaseId(base.name, base.revision, manifest.roots, asserted=asserted)
        spill = Spill(stage / "spill")
        for index, (name, factors) in enumerate(reading.adapter.modules.items()):
            check_update(weights, name, factors, file=source.weights)
            spill.put(name, _spectrum(factors, reading, config))
            inputs.listen(Progress("convert", index + 1, len(reading.adapter.modules)))
        ranks = choose_ranks(spill, rank=config.rank, tolerance=config.tolerance)
        _check_something_is_left(source, reading, ranks)
        ranks = level(ranks, weights)
        adapter = _adapter(reading, detection, bound_to, spill, ranks, weights)
        require_space(stage, written_bytes(adapter, config.form, getattr(torch, config.dtype)))
        root = _write(stage, adapter, source, config)
        write_text(stage / "README.md", model_card(adapter, config.form))
        errors = measure_written(stage, spill, ranks)
        done = Converted(output, root, detection, reading, adapter.base, adapter.origin, errors, warnings=warnings)
        _check_not_rounded_away(source, done, config)
        shutil.rmtree(spill.folder)
        done = replace(done, receipt=make_receipt(source, done, config))
        check_unchanged(before)
        write_json(stage / RECEIPT, done.receipt)
        seal_folder(stage, seal_record(root, done.base, done.origin, ExportConfig(config.form, config.dtype)))
    return replace(done, warnings=(*warnings, *_above_engines(errors)))


def _above_engines(modules: Mapping[str, ModuleError]) -> tuple[str, ...]:
    large = {path: module.rank for path, module in modules.items() if module.rank > LARGEST_RANK}
    if not large:
        return ()
    path = max(large, key=lambda one: large[one])
    have = counted(len(large), "module has", "modules have")
    return (
        f"{have} a rank above {LARGEST_RANK}, the largest that vLLM serves: {path} has "
        f"{large[path]}; a lower --rank or a larger --tolerance makes it less",
    )


def _spectrum(factors: LoraFactors, reading: Reading, config: ConvertConfig) -> Spectrum:
    tolerance = NUMERICAL[config.dtype]
    if reading.full_rank and config.rank is not None:
        return leading(factors, LEADING * config.rank, tolerance=tolerance)
    return compress(factors, tolerance=tolerance)


def _check_something_is_left(source: Source, reading: Reading, ranks: Mapping[str, int]) -> None:
    if any(ranks.values()):
        return
    what, hint = "the update is zero: the adapter changes nothing", "is this the adapter as it was before training?"
    if reading.adapter.carried:
        what = "the update is zero beside what is carried whole: LoRA has nothing to hold"
        hint = "carry fewer modules, or serve the model as a base of its own"
    raise InputError(what, code="GS-3106", file=source.weights, hint=hint)


def _write(stage: Path, adapter: Adapter, source: Source, config: ConvertConfig) -> str:
    """Write the adapter and return its root; what cannot be written is the input's fault, and named so."""
    try:
        return write_adapter(stage, adapter, config.form, getattr(torch, config.dtype))
    except InputError as err:
        raise err.naming(source.weights) from err


def _check_not_rounded_away(source: Source, done: Converted, config: ConvertConfig) -> None:
    """Refuse an output (GS-3144) of which the dtype has left nothing, where truncation would have left something."""
    if rounded_away(done.modules.values()):
        raise InputError(
            f"the update is so small that it is zero in {config.dtype}", code="GS-3144", file=source.weights,
            tensor=max(done.modules, key=lambda path: done.modules[path].norm),
            expected="values above 6e-8", hint="--dtype bfloat16 or float32",
        )  # fmt: skip


def _adapter(
    reading: Reading, detection: Detection, base: BaseId, spill: Spill, ranks: Mapping[str, int], weights: BaseWeights
) -> Adapter:
    """Return what is written: the chosen part of each spectrum, bound to the base by its roots."""
    kept = [path for path, rank in ranks.items() if rank]
    origin = {**reading.adapter.origin, "converted_from": detection.family, "converted_by": reading.method}
    return replace(
        reading.adapter,
        modules=LazyModules(kept, lambda path: levelled_factors(spill, path, ranks[path], weights)),
        base=base,
        origin=origin,
        fan_in_fan_out=all(weights.is_transposed(path) for path in kept),
    )
