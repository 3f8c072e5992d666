"""From adapters of any family to one adapter: read, held to the base, and given to `combine_files`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.read import check_can_be_low_rank, held_to_base, is_asserted, read, refuse_another_base
from converters.reading import Inputs
from converters.receipt import files_read
from gora_serve.adapter.factors import BaseId
from gora_serve.config import MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.combine_files import Ingredient, MergedAdapter, merge_into_adapter
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import check_folder
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import hash_model
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
    damaged adapter, BindingError (GS-401, GS-4352) for one of another base.
    """
    config = config or MergeConfig(into="adapter")
    config.validate()
    check_is_unicode(output)
    inputs = replace(inputs or Inputs(), base=BaseWeights(base.path))
    others = [one for one in (inputs.init_adapter, inputs.mutated_base, inputs.cache) if one is not None]
    protect = [base.path, *(path for path, _ in adapters), *others]
    check_target(output, overwrite=overwrite, protect=protect)
    for path, _ in adapters:
        if (path / SEAL).is_file():
            check_folder(path)
    opened = [(path, weight, *read(path, inputs, config.family)) for path, weight in adapters]
    limited = any(limit is not None for limit in (config.rank, config.tolerance, config.parameters))
    for _, _, source, detection, reading in opened:
        check_can_be_low_rank(source, detection, reading, limited=limited)
    manifest = hash_model(base.path, listen=inputs.listen)
    remember_manifest(manifest)
    for _, _, source, detection, reading in opened:
        refuse_another_base(source, detection, reading, lambda: manifest, base)
    sources = [source for _, _, source, _, _ in opened]
    warnings = [
        line for _, _, source, detection, reading in opened
        for line in held_to_base(source, detection, reading, lambda: manifest, base, inputs)
    ]  # fmt: skip
    asserted = any(is_asserted(source, manifest.roots.weights) for source in sources)
    ingredients = [
        Ingredient(
            str(path), reading.adapter, weight, tuple(files_read(source, reading)),
            read_record(source.tensors.metadata, source.weights).get("adapter_root"), detection.family,
        )
        for path, weight, source, detection, reading in opened
    ]  # fmt: skip
    bound_to = BaseId(base.name, base.revision, manifest.roots, asserted=asserted)
    done = merge_into_adapter(
        ingredients, inputs.need_base("merge"), bound_to, output, config, overwrite=overwrite, protect=protect,
        listen=inputs.listen,
    )  # fmt: skip
    return replace(done, warnings=tuple(dict.fromkeys([*warnings, *done.warnings])))
