"""`merge --into adapter` from read adapters to a folder: combined, truncated, rounded once, measured, with a receipt.

An edge: one module in memory at a time, the spectra wait on disk. What the adapters are, and that they belong to the
base, the caller has found out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import gora_serve
from gora_serve.adapter.card import model_card
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.format import read_adapter, seal_record, write_adapter
from gora_serve.adapter.linalg import NUMERICAL
from gora_serve.adapter.measure import Measured, ModuleError, measure_written, rounded_away
from gora_serve.adapter.spill import Spill
from gora_serve.config import ExportConfig, ExportDtype, MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.combine import Combined, Limits, combine
from gora_serve.deploy.methods import DENSITY
from gora_serve.deploy.stacks import level, levelled_factors
from gora_serve.deploy.update import check_carried, check_update
from gora_serve.errors import InputError
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.files import sha256_file, staged_folder, write_json, write_text
from gora_serve.integrity.reading import check_unchanged, stamps
from gora_serve.integrity.record import binding_json
from gora_serve.progress import Listener, silent

RECEIPT = "merge.json"
SCHEMA = "gora-serve/merge/1"  # "into" says whether it tells of an adapter or of a model


@dataclass(frozen=True)
class Ingredient:
    """One adapter that goes in. name: what the user called it. files: all that it was read from. root: its adapter
    root, where the tool knows it. family: as `convert` has it.
    """

    name: str
    adapter: Adapter
    weight: float
    files: tuple[Path, ...]
    root: str | None = None
    family: str = "lora"


@dataclass(frozen=True)
class MergedAdapter(Measured):
    """What was written, and how far it is from the exact result of the method. receipt: the content of merge.json."""

    folder: Path
    root: str
    adapter: Adapter
    modules: Mapping[str, ModuleError]
    receipt: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def merge_into_adapter(
    ingredients: Sequence[Ingredient],
    base: BaseWeights,
    bound_to: BaseId,
    output: Path,
    config: MergeConfig,
    *,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
    listen: Listener = silent,
) -> MergedAdapter:
    """Write one adapter for several into `output`, in the form and dtype asked for, with manifest and merge.json.

    bound_to: `base` by its roots, to which the result is bound. Nothing is written where anything is refused. Raises
    BindingError (GS-404, GS-405) for modules that the base lacks or has in another shape; InputError: GS-3452 where
    nothing is left of the updates, GS-3456 where the limit keeps none, GS-3454 where the dtype leaves nothing; and what
    `combine` raises.
    """
    dtype: ExportDtype = "float32" if config.dtype == "auto" else config.dtype
    limits = Limits(config.rank, config.tolerance, config.parameters)
    inputs = [path for one in ingredients for path in one.files]
    with staged_folder(output, overwrite=overwrite, protect=[base.folder, *protect, *inputs]) as stage:
        before = stamps(inputs)
        _check(ingredients, base)
        spill = Spill(stage / "spill")
        done = combine(
            [(one.adapter, one.weight) for one in ingredients], config.method, limits, density=config.density,
            seed=config.seed, base=bound_to, spectra=spill, precision=NUMERICAL[dtype], listen=listen,
        )  # fmt: skip
        if not done.adapter.modules:
            raise _nothing_is_left(done, ingredients, config)
        ranks = level(done.ranks, base)
        adapter = _finished(done, ranks, ingredients, base, config)
        root = write_adapter(stage, adapter, config.form, getattr(torch, dtype))
        write_text(stage / "README.md", model_card(adapter, config.form))
        modules = measure_written(stage, spill, ranks)
        _check_not_rounded_away(modules, dtype)
        shutil.rmtree(spill.folder)
        merged = MergedAdapter(output, root, read_adapter(stage), modules)
        merged = replace(merged, warnings=_above_budget(merged, done, ranks, config))
        merged = replace(merged, receipt=make_receipt(merged, done, ingredients, config))
        check_unchanged(before)
        write_json(stage / RECEIPT, merged.receipt)
        seal_folder(stage, seal_record(root, adapter.base, adapter.origin, ExportConfig(config.form, dtype)))
    return replace(merged, adapter=read_adapter(output))


def _check(ingredients: Sequence[Ingredient], base: BaseWeights) -> None:
    for one in ingredients:
        file = one.files[0] if one.files else None
        for path, factors in one.adapter.modules.items():
            check_update(base, path, factors, file=file)
        check_carried(base, one.adapter.carried, file=file)


def _nothing_is_left(done: Combined, ingredients: Sequence[Ingredient], config: MergeConfig) -> InputError:
    """Return the error for a result without modules: nothing fits the limit (GS-3456), or no update is left (GS-3452).

    Of the limits only a number of parameters can leave nothing.
    """
    smallest = min((sum(one.shape) for one in done.spectra.values() if one.numerical_rank), default=None)
    if smallest is None:
        why, hint = "they cancel", "look at the weights; is one of them the other's with the opposite sign?"
        if all(_is_zero(factors) for one in ingredients for factors in one.adapter.modules.values() if one.weight):
            why, hint = "each of them is zero", "are these the adapters as they were before training?"
        elif config.method in DENSITY:
            why = f"--method {config.method} keeps {_density(config):g} of their values, and these are zero or cancel"
            hint = "a larger --density; or look at the weights"
        return InputError(
            "nothing is left of the updates: the merged adapter changes nothing", code="GS-3452", actual=why, hint=hint
        )
    return InputError(
        "the number of parameters is too small: rank 1 of no module fits", code="GS-3456",
        expected=f"--parameters {smallest} or more", actual=done.limits.parameters,
        hint=f"--parameters {smallest} keeps one direction of the smallest module; or --rank R, --tolerance T",
    )  # fmt: skip


def _is_zero(factors: LoraFactors) -> bool:
    return not (factors.scale and factors.A.any() and factors.B.any())


def _above_budget(
    merged: MergedAdapter, done: Combined, ranks: Mapping[str, int], config: MergeConfig
) -> tuple[str, ...]:
    """Say where more is written than the budget has: modules that are written at a rank above their own, and why."""
    written, budget = merged.adapter.parameters, done.limits.parameters
    if budget is None or written <= budget:
        return ()
    whose = "asked for" if config.parameters is not None else "of the largest adapter"
    why = []
    if any(rank > done.ranks.get(path, 0) for path, rank in ranks.items()):
        why.append("the experts of a layer are written at one rank, the largest among them")
    if config.form == "padded":
        why.append("--form padded writes all modules at one rank, the largest among them")
    return (f"{written:,} parameters, above the {budget:,} {whose}: {'; '.join(why)}",)


def _check_not_rounded_away(modules: Mapping[str, ModuleError], dtype: str) -> None:
    if rounded_away(modules.values()):
        raise InputError(
            f"the merged update is so small that it is zero in {dtype}", code="GS-3454",
            tensor=max(modules, key=lambda path: modules[path].norm), hint="--dtype bfloat16 or float32",
        )  # fmt: skip


def _finished(
    done: Combined, ranks: Mapping[str, int], ingredients: Sequence[Ingredient], base: BaseWeights, config: MergeConfig
) -> Adapter:
    """Return what is written: experts in whole layers, as engines want them, and where the adapter comes from."""
    kept = [path for path, rank in ranks.items() if rank]
    return replace(
        done.adapter,
        modules=LazyModules(kept, lambda path: levelled_factors(done.spectra, path, ranks[path], base)),
        origin=_origin(done, ingredients, config),
        fan_in_fan_out=all(base.is_transposed(path) for path in kept),
    )


def _origin(done: Combined, ingredients: Sequence[Ingredient], config: MergeConfig) -> dict[str, str]:
    """The same for any order of the adapters, so that the files are too."""
    pairs = zip(ingredients, done.weights, strict=True)
    parts = sorted(({"adapter": one.root or one.name, "weight": weight} for one, weight in pairs), key=repr)
    trained_on = {one.adapter.origin.get("trained_on") for one in ingredients}
    common = {"trained_on": str(*trained_on)} if len(trained_on) == 1 and None not in trained_on else {}
    return {"merged_by": config.method, "merged_from": json.dumps(parts, sort_keys=True), **common}


def make_receipt(
    merged: MergedAdapter, done: Combined, ingredients: Sequence[Ingredient], config: MergeConfig
) -> dict[str, Any]:
    """Return the content of merge.json: the same inputs give the same text."""
    base = merged.adapter.base
    return {
        "schema": SCHEMA,
        "tool": f"gora-serve {gora_serve.__version__}",
        "into": "adapter",
        "method": config.method,
        "settings": asdict(config),
        "applied": {"limits": asdict(done.limits), "density": _density(config)},
        "adapters": [_input(one, weight) for one, weight in zip(ingredients, done.weights, strict=True)],
        "base": binding_json(base.name, base.revision, base.roots, asserted=base.asserted),
        "adapter_root": merged.root,
        "parameters": merged.adapter.parameters,
        "notes": list(merged.warnings),
        "error": merged.error,
        "truncated": merged.truncated,
        "modules": {path: asdict(module) for path, module in merged.modules.items()},
        "carried": sorted(merged.adapter.carried),
    }


def _density(config: MergeConfig) -> float | None:
    return config.density if config.density is not None else DENSITY.get(config.method)


def _input(one: Ingredient, applied: float) -> dict[str, Any]:
    """weight: as it was given; applied_weight: as the method takes it. files: by SHA-256."""
    return {
        "adapter": one.name,
        "weight": one.weight,
        "applied_weight": applied,
        "family": one.family,
        "adapter_root": one.root,
        "trained_on": one.adapter.origin.get("trained_on"),
        "files": {str(file): sha256_file(file)[1] for file in one.files if file.is_file()},
    }
