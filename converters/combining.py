"""From adapters of any family to one adapter: read, held to the base, and given to `combine_files`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.base_names import check_names, names_of
from converters.merge_receipt import Opened
from converters.read import check_can_be_low_rank, held_to_base, is_asserted, read, refuse_another_base
from converters.reading import Inputs
from gora_serve.adapter.factors import BaseId
from gora_serve.config import MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.combine_files import Ingredient, MergedAdapter, merge_into_adapter
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import check_folder
from gora_serve.integrity.known import hash_base
from gora_serve.integrity.record import read_record
from gora_serve.integrity.staging import SEAL, check_target
from gora_serve.integrity.targets import check_is_unicode


def merge_adapters(
    adapters: Sequence[tuple[Path, float]],
    base: Base,
    output: Path,
    config: MergeConfig | None = None,
    inputs: Inputs | None = None,
    *,
    overwrite: bool = False,
) -> MergedAdapter:
    """Write one adapter for several, each with its weight, into `output`, bound to `base`, with a receipt.

    Adapters may be of any family that `convert` reads; sealed ones are held to their manifests. Raises what the readers
    and `merge_into_adapter` raise, UsageError (GS-231) for an update of full rank without a limit, MismatchError for a
    damaged adapter, BindingError (GS-401, GS-4352) for one of another base, and for two names of one module (GS-454).
    """
    config = config or MergeConfig(into="adapter")
    config.validate()
    check_is_unicode(output)
    weights = BaseWeights(base.path)
    inputs = replace(inputs or Inputs(), base=weights)
    protect = [base.path, *(path for path, _ in adapters), *inputs.beside]
    check_target(output, overwrite=overwrite, protect=protect)
    for path, _ in adapters:
        if (path / SEAL).is_file():
            check_folder(path)
    opened = [Opened(path, weight, *read(path, inputs, config.family)) for path, weight in adapters]
    check_names([(one.source.weights, names_of(one.reading)) for one in opened], weights)
    limited = any(limit is not None for limit in (config.rank, config.tolerance, config.parameters))
    for one in opened:
        check_can_be_low_rank(one.source, one.detection, one.reading, limited=limited)
    manifest = hash_base(base.path, listen=inputs.listen)
    for one in opened:
        refuse_another_base(one.source, one.detection, one.reading, lambda: manifest, base)
    warnings = [
        line for one in opened
        for line in held_to_base(one.source, one.detection, one.reading, lambda: manifest, base, inputs)
    ]  # fmt: skip
    asserted = any(is_asserted(one.source, manifest.roots.weights) for one in opened)
    ingredients = [
        Ingredient(
            str(one.path), one.reading.adapter, one.weight, tuple(one.files),
            read_record(one.source.tensors.metadata, one.source.weights).get("adapter_root"), one.detection.family,
        )
        for one in opened
    ]  # fmt: skip
    bound_to = BaseId(base.name, base.revision, manifest.roots, asserted=asserted)
    done = merge_into_adapter(
        ingredients, weights, bound_to, output, config, overwrite=overwrite, protect=protect,
        listen=inputs.listen,
    )  # fmt: skip
    return replace(done, warnings=tuple(dict.fromkeys([*warnings, *done.warnings])))
