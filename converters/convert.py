"""From a foreign checkpoint to plain LoRA on the untouched base: read, recompress, truncate, write, measure, receipt.

The same for all families. One module is in memory at a time. Of a full-rank update (DoRA, a full fine-tune) with
--rank R only the first 8 R directions of a module are computed, so that no module gets more than rank 8 R; the errors
that are stated count what lies beyond them. With --tolerance the whole spectrum is, which takes longer.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from converters.detect import Detection, decide
from converters.families import family_named
from converters.patterns import LEFT_OUT, Patterns
from converters.reading import Inputs, Reading
from converters.receipt import RECEIPT, Converted, ModuleError, make_receipt
from converters.source import Source, open_source
from converters.spill import Spill
from converters.stacks import level, levelled_factors
from gora_serve.adapter.card import model_card
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.format import read_adapter, seal_record, write_adapter
from gora_serve.adapter.linalg import Spectrum, compress, distance, leading
from gora_serve.adapter.truncate import ranks_of_budget, ranks_of_tolerance
from gora_serve.config import ConvertConfig, ExportConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import check_binding, seal_folder
from gora_serve.integrity.files import staged_folder, write_json, write_text
from gora_serve.integrity.manifest import Roots, hash_model
from gora_serve.integrity.record import bound_roots, read_record
from gora_serve.progress import Progress

# Of an update's norm: less than rounding to this dtype costs (unit roundoffs are 6e-8, 2e-3 and 5e-4).
NUMERICAL: Mapping[str, float] = {"float32": 1e-7, "bfloat16": 5e-4, "float16": 1e-4}

LEADING = 8  # times --rank: the most that a module of full rank can get


def read(path: Path, inputs: Inputs, family: str = "auto") -> tuple[Source, Detection, Reading]:
    """Open a checkpoint, decide its family and read it, with every tensor accounted for.

    Raises UsageError (GS-238) for an option that is a full fine-tune's, and what `decide`, the reader and `_account`
    raise.
    """
    source = open_source(path, pickles=inputs.pickles)
    detection = decide(source, inputs, family)
    if detection.family != "full" and inputs.carry:
        raise UsageError(
            f"--carry is for a fine-tuned model; this is {detection.family}", code="GS-238", file=source.weights,
            actual=", ".join(inputs.carry), hint="leave --carry out: what an adapter saved whole is carried unasked",
        )  # fmt: skip
    reading = family_named(detection.family).read(source, inputs)
    return source, detection, _account(source, detection, reading, inputs)


def _account(source: Source, detection: Detection, reading: Reading, inputs: Inputs) -> Reading:
    """Return the reading with what the user leaves out among the known tensors.

    Raises InputError for a tensor that would be lost: GS-3115 with the reason, GS-3104 where it is not the family's.
    """
    leave_out = Patterns("--leave-out", inputs.leave_out)
    others = source.tensors.keys() - reading.applied - reading.carried - reading.known.keys() - reading.lost.keys()
    lost = {**reading.lost, **dict.fromkeys(sorted(others), f"{detection.family} has no such tensor")}
    left_out = {name: f"{LEFT_OUT}: {why}" for name, why in lost.items() if leave_out.match(name)}
    if detection.family != "full":  # whose reader has checked them, against the base's tensors too
        leave_out.check()
    remaining = [name for name in lost if name not in left_out]
    if remaining:
        more = f" (and {len(remaining) - 1} more)" if len(remaining) > 1 else ""
        known = remaining[0] in reading.lost
        raise InputError(
            f"a tensor{more} would be lost", code="GS-3115" if known else "GS-3104", file=source.weights,
            tensor=remaining[0], actual=lost[remaining[0]],
            hint="merging the adapter is exact; --leave-out NAMES drops the tensor and says so" if known
            else "name the family by --from, or report the file's tensor names; --leave-out NAMES drops the tensor",
        )  # fmt: skip
    return replace(reading, known={**reading.known, **left_out})


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
    inputs = replace(inputs or Inputs(), base=BaseWeights(base.path))
    others = [one for one in (inputs.init_adapter, inputs.mutated_base, inputs.cache) if one is not None]
    with staged_folder(output, overwrite=overwrite, protect=[path, base.path, *others]) as stage:
        source, detection, reading = read(path, inputs, config.family)
        _check_can_be_low_rank(source, detection, reading, config)
        _check_carried(source, reading)
        roots = _roots(source, base, inputs)
        spill = Spill(stage / "spill")
        for index, (name, factors) in enumerate(reading.adapter.modules.items()):
            _check_module(name, factors, inputs)
            spill.put(name, _spectrum(factors, reading, config))
            inputs.listen(Progress("convert", index + 1, len(reading.adapter.modules)))
        ranks = choose_ranks(spill, config)
        _check_something_is_left(source, reading, ranks)
        ranks = level(ranks, inputs.need_base("convert"))
        adapter = _adapter(reading, detection, BaseId(base.name, base.revision, roots), spill, ranks, inputs)
        root = write_adapter(stage, adapter, config.form, getattr(torch, config.dtype))
        write_text(stage / "README.md", model_card(adapter, config.form))
        done = Converted(output, root, detection, reading, adapter.base, adapter.origin, _measure(stage, spill, ranks))
        shutil.rmtree(spill.folder)
        done = replace(done, receipt=make_receipt(source, done, config))
        write_json(stage / RECEIPT, done.receipt)
        seal_folder(stage, seal_record(root, done.base, done.origin, ExportConfig(config.form, config.dtype)))
    return done


def _check_can_be_low_rank(source: Source, detection: Detection, reading: Reading, config: ConvertConfig) -> None:
    if reading.full_rank and config.rank is None and config.tolerance is None:
        raise UsageError(
            f"a {detection.family} update has full rank: as LoRA it can be had only truncated", code="GS-231",
            file=source.weights, expected="--rank R or --tolerance T",
            hint="--rank or --tolerance gives the nearest LoRA, and its error; merging is the exact way",
        )  # fmt: skip


def _roots(source: Source, base: Base, inputs: Inputs) -> Roots:
    """Hash the base. Raises BindingError (GS-401) where the adapter itself says that it belongs to another one."""
    manifest = hash_model(base.path, listen=inputs.listen)
    bound = bound_roots(read_record(source.tensors.metadata, source.weights))
    if bound is not None:
        check_binding(bound, manifest, base=base.path)
    return manifest.roots


def _check_module(path: str, factors: LoraFactors, inputs: Inputs) -> None:
    base = inputs.need_base("convert")
    if factors.shape != base.shape(path):
        raise BindingError(
            "the adapter does not fit this base", code="GS-405", file=base.folder, tensor=path,
            expected=f"(out, in) {base.shape(path)}", actual=factors.shape,
            hint="give the base that the adapter was trained on",
        )  # fmt: skip
    if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
        raise InputError(
            "the update holds NaN or infinite values", code="GS-3105", tensor=path,
            hint="training diverged, or the file is damaged: use an earlier checkpoint",
        )  # fmt: skip


def _check_carried(source: Source, reading: Reading) -> None:
    for parameter, tensor in reading.adapter.carried.items():
        if not tensor.isfinite().all():
            raise InputError(
                "a module that is carried holds NaN or infinite values", code="GS-3105", file=source.weights,
                tensor=parameter, hint="training diverged, or the file is damaged: use an earlier checkpoint",
            )  # fmt: skip


def _spectrum(factors: LoraFactors, reading: Reading, config: ConvertConfig) -> Spectrum:
    tolerance = NUMERICAL[config.dtype]
    if reading.full_rank and config.rank is not None:
        return leading(factors, LEADING * config.rank, tolerance=tolerance)
    return compress(factors, tolerance=tolerance)


def choose_ranks(spill: Spill, config: ConvertConfig) -> dict[str, int]:
    """Return the rank of each module, 0 where nothing is left of it: the numerical one, or one choice over all."""
    if config.tolerance is not None:
        return ranks_of_tolerance({path: module.singular for path, module in spill.items()}, config.tolerance)
    singular = {path: module.singular[: module.numerical_rank] for path, module in spill.items()}
    if config.rank is not None:
        return ranks_of_budget(singular, {path: module.shape for path, module in spill.items()}, config.rank)
    return {path: len(values) for path, values in singular.items()}


def _check_something_is_left(source: Source, reading: Reading, ranks: Mapping[str, int]) -> None:
    if any(ranks.values()):
        return
    what, hint = "the update is zero: the adapter changes nothing", "is this the adapter as it was before training?"
    if reading.adapter.carried:
        what = "the update is zero beside what is carried whole: LoRA has nothing to hold"
        hint = "carry fewer modules, or serve the model as a base of its own"
    raise InputError(what, code="GS-3106", file=source.weights, hint=hint)


def _adapter(
    reading: Reading, detection: Detection, base: BaseId, spill: Spill, ranks: Mapping[str, int], inputs: Inputs
) -> Adapter:
    """Return what is written: the chosen part of each spectrum, bound to the base by its roots."""
    kept = [path for path, rank in ranks.items() if rank]
    origin = {**reading.adapter.origin, "converted_from": detection.family, "converted_by": reading.method}
    weights = inputs.need_base("convert")
    return replace(
        reading.adapter,
        modules=LazyModules(kept, lambda path: levelled_factors(spill, path, ranks[path], weights)),
        base=base,
        origin=origin,
        fan_in_fan_out=all(weights.is_transposed(path) for path in kept),
    )


def _measure(stage: Path, spill: Spill, ranks: Mapping[str, int]) -> dict[str, ModuleError]:
    """Read back what was written and return how far it is from the exact update, module by module."""
    written = read_adapter(stage).modules
    errors = {}
    for path, module in spill.items():
        spectrum, rank = module.load(), ranks[path]
        held = min(rank, spectrum.rank)
        norm, truncated = spectrum.dropped(0), spectrum.dropped(rank)
        error = math.hypot(distance(written[path], spectrum.first(spectrum.rank)), spectrum.rest) if held else norm
        errors[path] = ModuleError(rank, spectrum.numerical_rank, norm, truncated, error)
    return errors
