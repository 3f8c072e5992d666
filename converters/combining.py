"""From adapters of any family to one adapter: read, held to their base, and handed to `merge_into_adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from converters.read import held_to_base, is_asserted, read
from converters.reading import Inputs
from converters.receipt import files_read
from gora_serve.adapter.factors import BaseId
from gora_serve.config import MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.combine_files import Ingredient, MergedAdapter, merge_into_adapter
from gora_serve.integrity.bases import Base
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.record import read_record
from gora_serve.integrity.staging import check_target


def merge_adapters(
    adapters: Sequence[tuple[Path, float]],
    base: Base,
    output: Path,
    config: MergeConfig,
    inputs: Inputs,
    *,
    overwrite: bool = False,
) -> tuple[MergedAdapter, tuple[str, ...]]:
    """Write one adapter for several, bound to `base`; return it and what to warn of.

    Raises BindingError (GS-401) for an adapter of another base, and what reading and `merge_into_adapter` raise.
    """
    weights = BaseWeights(base.path)
    inputs = replace(inputs, base=weights)
    folders = [path for path, _ in adapters]
    check_target(output, overwrite=overwrite, protect=[base.path, *folders])
    opened = [(path, weight, *read(path, inputs, config.family)) for path, weight in adapters]
    manifest = cache(lambda: hash_model(base.path, listen=inputs.listen))
    warnings = [line for _, _, source, *_ in opened for line in held_to_base(source, manifest, base.path, inputs)]
    remember_manifest(manifest())
    asserted = any(is_asserted(source) for _, _, source, *_ in opened)
    ingredients = [
        Ingredient(
            str(path), reading.adapter, weight, tuple(files_read(source, reading)),
            read_record(source.tensors.metadata, source.weights).get("adapter_root"), detection.family,
            reading.full_rank,
        )
        for path, weight, source, detection, reading in opened
    ]  # fmt: skip
    done = merge_into_adapter(
        ingredients, weights, BaseId(base.name, base.revision, manifest().roots, asserted=asserted), output, config,
        overwrite=overwrite, protect=folders, listen=inputs.listen,
    )  # fmt: skip
    return done, tuple(dict.fromkeys(warnings))
