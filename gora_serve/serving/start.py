"""From a base and adapter folders to a plan that may be run: everything is verified first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gora_serve.config import ServeConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.advisories import ENGINE_PACKAGES, vulnerable_versions
from gora_serve.integrity.bases import Base, locate_adapter, locate_base
from gora_serve.integrity.known import hash_base
from gora_serve.integrity.layout import INDEX, find_model
from gora_serve.integrity.named_base import names_of
from gora_serve.integrity.reading import stamps
from gora_serve.integrity.remote_code import refuse_remote_code
from gora_serve.integrity.roots import tokenizer_names
from gora_serve.progress import Listener, silent
from gora_serve.serving.adapter_names import check_name as check_adapter_name
from gora_serve.serving.adapter_names import require_free
from gora_serve.serving.admit import Examined, content_in, examine, keep, served_from
from gora_serve.serving.arrivals import look_at
from gora_serve.serving.base_weights import refuse_other_weights
from gora_serve.serving.engine import Engine, check_port_free, find_engine, scrubbed
from gora_serve.serving.live import examined
from gora_serve.serving.options import check_options, group_options, single
from gora_serve.serving.plan import (
    SCRUBBED,
    ServePlan,
    architecture,
    listening,
    name_of_base,
    plan_server,
    refuse_encoder_decoder,
    uses_plugin,
    with_device,
)
from gora_serve.serving.plugin import why_stock
from gora_serve.serving.preflight import refuse
from gora_serve.serving.room import Room, require_place, require_room
from gora_serve.serving.served import ServedAdapter, ServedBase
from gora_serve.serving.store import Store


def prepare(
    base: str,
    adapters: Sequence[tuple[str, Path]],
    config: ServeConfig,
    extra: Sequence[str] = (),
    *,
    strict: bool = False,
    dry: bool = False,
    listen: Listener = silent,
) -> tuple[ServePlan, list[str]]:
    """Return the plan to run, and the warnings to show.

    adapters: (name, folder or hub id with its revision). Every adapter that gora-serve wrote is verified byte by byte
    and against the base; one of another tool is served with a warning, or refused where `strict` is set, as are
    versions of the engine's packages that an advisory names. All faults of all adapters come in one error. What is
    served are copies in the store; with `dry` they are not made, and the plan names where they would be. Raises before
    any process starts. What is wrong with adapters of the watched directory stops nothing: it is told by who watches.
    """
    for name, _ in adapters:
        check_adapter_name(name)
    options = group_options(extra)
    check_options(options, ())
    url, _ = listening(config, options, os.environ)  # what is quickly refused comes before the base is hashed
    if not dry:
        check_port_free(url)
    located = locate_base(base)
    if "--trust-remote-code" not in options:
        refuse_remote_code(located.path)
    beside = refuse_other_weights(located.path, single(options, "--load-format"))
    if adapters or config.adapters_dir is not None:
        refuse_encoder_decoder(located.path)
    warnings = vulnerable_versions(ENGINE_PACKAGES, strict=strict)
    warnings += [f"{name} is set, and taken away from the engine" for name in scrubbed(os.environ, SCRUBBED)]
    warnings += _without_effect(config)
    verified = stamps(_base_files(located.path))
    target = served_base(located, single(options, "--served-model-name") or config.served_name, listen)
    found = [examine(name, locate_adapter(folder), target, strict=strict) for name, folder in adapters]
    refuse([fault for one in found for fault in one.faults])
    warnings += [warning for one in found for warning in one.warnings]
    engine = find_engine()
    settled, reason = _with_plugin(with_device(config, engine.device), engine)
    warnings += [reason] if reason and adapters else []
    if located.revision and settled.served_name is None:  # the cache's folder is called after the commit
        settled = replace(settled, served_name=located.name.rpartition("/")[2])
    store = Store(config.store)
    taken = [name_of_base(located.path, settled, options), *(name for name, _ in adapters)]
    watched, told = _of_directory(config.adapters_dir, target, store, taken, strict=strict)
    # refused options come before any copy
    plan_server(located.path, _planned(found, store), settled, extra, watched=watched)
    served = _planned(found, store) if dry else _stored(found, target, store, strict=strict)
    plan = plan_server(located.path, served, settled, extra, watched=watched)
    if plan.watched is not None:
        names, more = _that_find_room(watched, len(served), plan.watched.room)
        told += more
        directory = replace(plan.watched, base=target, store=config.store, strict=strict, found=names)
        plan = replace(plan, watched=directory)
    warnings += told if dry else []
    copies = [] if dry else [file for adapter in served for file in adapter.path.iterdir()]
    return replace(plan, stamps=verified | stamps(copies), beside=beside), warnings


def _without_effect(config: ServeConfig) -> list[str]:
    """Return what is to be said of settings of a watched directory where none is watched."""
    if config.adapters_dir is not None:
        return []
    given = {
        "--max-adapters": config.max_adapters != ServeConfig.max_adapters,
        "--max-rank": config.max_rank != ServeConfig.max_rank,
    }
    return [f"{option} has no effect without --adapters" for option, changed in given.items() if changed]


def _with_plugin(config: ServeConfig, engine: Engine) -> tuple[ServeConfig, str | None]:
    """Return the configuration as this engine can have it, and what is to be said about that."""
    reason = why_stock(engine.version) if uses_plugin(config) else None
    if reason is None:
        return config, None
    return replace(config, plugin=False), f"vLLM's own LoRA layers are used, gora-serve's plugin is off: {reason}"


def served_base(located: Base, served_name: str | None = None, listen: Listener = silent) -> ServedBase:
    """Hash the base that adapters are admitted to."""
    manifest = hash_base(located.path, listen=listen)
    names = names_of(located.path, located.name, *([served_name] if served_name else []))
    return ServedBase(located.path, manifest, architecture(located.path), names)


def _of_directory(
    folder: Path | None, base: ServedBase, store: Store, taken: Sequence[str], *, strict: bool
) -> tuple[list[ServedAdapter], list[str]]:
    """Return what may be served of a watched directory, and why the others may not. Nothing is copied.

    taken: the names of what is served beside.
    """
    served: list[ServedAdapter] = []
    told: list[str] = []
    for name, seen in look_at(folder).items() if folder is not None else ():
        try:
            require_free(name, [*taken, *(one.name for one in served)])
            found = examined(name, seen, base, strict=strict)
            served.append(served_from(found, store.place(content_in(found))))
        except (GoraError, OSError) as err:
            told.append(_would_not(seen.path, err))
    return served, told


def _that_find_room(watched: Sequence[ServedAdapter], fixed: int, room: Room) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of those of a watched directory that the engine has room for, and why it has none for others.

    fixed: how many adapters are served beside.
    """
    names: list[str] = []
    told: list[str] = []
    for adapter in watched:
        try:
            require_room(adapter, room)
            require_place(adapter, fixed + len(names), room)
            names.append(adapter.name)
        except GoraError as err:
            told.append(_would_not(adapter.source, err))
    return tuple(names), told


def _would_not(path: Path | None, err: Exception) -> str:
    why = f"[{err.code}] {err.what}" if isinstance(err, GoraError) else str(err)
    return f"{path}: would not be served: {why}"


def _planned(found: Sequence[Examined], store: Store) -> tuple[ServedAdapter, ...]:
    return tuple(served_from(one, store.place(content_in(one))) for one in found)


def _stored(found: Sequence[Examined], base: ServedBase, store: Store, *, strict: bool) -> tuple[ServedAdapter, ...]:
    store.sweep()
    return tuple(keep(one, base, store, strict=strict) for one in found)


def _base_files(base: Path) -> list[Path]:
    """Return the files of the base that were hashed and that the engine will read: weights and their index, the
    configuration, the tokenizer with its chat template."""
    model = find_model(base)
    small = ([INDEX] if model.placed is not None else []) + ["config.json", *tokenizer_names(base)]
    return [*model.weights.values(), *(base / name for name in small)]
