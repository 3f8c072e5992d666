"""From a base and adapter folders to a plan that may be run: everything is verified first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gora_serve.integrity.advisories import ENGINE_PACKAGES, vulnerable_versions
from gora_serve.integrity.bases import locate_adapter, locate_base
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.reading import stamps
from gora_serve.integrity.remote_code import refuse_remote_code
from gora_serve.integrity.staging import SEAL
from gora_serve.integrity.verify import verify_adapter, verify_unsealed
from gora_serve.progress import Listener, silent
from gora_serve.serving.adapter_dir import WEIGHTS_FILE, read_adapter_dir, unused_pickles
from gora_serve.serving.engine import find_engine, scrubbed
from gora_serve.serving.fits import check_fit
from gora_serve.serving.options import group_options
from gora_serve.serving.plan import (
    SAME_NAMES,
    SCRUBBED,
    ServeConfig,
    ServePlan,
    architecture,
    plan_server,
    read_served_adapters,
    with_device,
)


def prepare(
    base: str,
    adapters: Sequence[tuple[str, Path]],
    config: ServeConfig,
    extra: Sequence[str] = (),
    *,
    strict: bool = False,
    listen: Listener = silent,
) -> tuple[ServePlan, list[str]]:
    """Return the plan to run, and the warnings to show.

    adapters: (name, folder or hub id with its revision). Every adapter that gora-serve wrote is verified byte by byte
    and against the base; one of another tool is served with a warning, or refused where `strict` is set, as are
    versions of the engine's packages that an advisory names. Raises before any process starts.
    """
    located = locate_base(base)
    if "--trust-remote-code" not in group_options(extra):
        refuse_remote_code(located.path)
    adapters = [(name, locate_adapter(folder)) for name, folder in adapters]
    served = read_served_adapters(adapters)
    verified = stamps(_files(located.path, adapters))
    warnings = vulnerable_versions(ENGINE_PACKAGES, strict=strict)
    warnings += [f"{name} is set, and taken away from the engine" for name in scrubbed(os.environ, SCRUBBED)]
    manifest = hash_model(located.path, listen=listen)
    remember_manifest(manifest)
    for name, folder in adapters:
        if (folder / SEAL).is_file():
            done = verify_adapter(folder, base=located.path, base_manifest=manifest, strict=strict)
        else:
            done = verify_unsealed(folder, base=located.path, base_manifest=manifest, strict=strict)
        if done.bound_to is None:
            same_names = architecture(located.path) in SAME_NAMES
            check_fit(read_adapter_dir(name, folder), manifest.tensors, same_names=same_names)
        warnings += [f"{name}: {warning}" for warning in done.warnings]
        warnings += [f"{name}: {pickle} is not used, {WEIGHTS_FILE} is" for pickle in unused_pickles(folder)]
    settled = with_device(config, find_engine().device)
    if located.revision and settled.served_name is None:  # the cache's folder is called after the commit
        settled = replace(settled, served_name=located.name.rpartition("/")[2])
    return replace(plan_server(located.path, served, settled, extra), stamps=verified), warnings


def _files(base: Path, adapters: Sequence[tuple[str, Path]]) -> list[Path]:
    """Return the files that the engine will read: the base's weights and configuration, all files of the adapters."""
    files = [*find_model(base).weights.values(), base / "config.json"]
    return files + [path for _, folder in adapters for path in folder.iterdir() if path.is_file()]
