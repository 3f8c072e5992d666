"""From a finished run to the standard adapter folder that PEFT and vLLM load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gora_serve.adapter.card import model_card
from gora_serve.adapter.factors import Adapter
from gora_serve.adapter.format import read_adapter, seal_record, write_adapter, written_bytes
from gora_serve.config import ExportConfig
from gora_serve.deploy.gguf_file import GGUF, GgufWritten, base_config, need_gguf, write_gguf
from gora_serve.errors import InputError, MachineError, UsageError
from gora_serve.integrity.bases import Base, locate_settings
from gora_serve.integrity.binding import check_folder, seal_folder
from gora_serve.integrity.files import staged_folder, write_text
from gora_serve.integrity.space import require_space
from gora_serve.integrity.targets import check_is_unicode
from gora_serve.integrity.verify import find_adapter
from gora_serve.training.reference import fingerprint


@dataclass(frozen=True)
class Exported:
    """Where the adapter lies, its root, the adapter as it was trained, what became of its fingerprint, and the file for
    llama.cpp if there is one."""

    folder: Path
    root: str
    adapter: Adapter
    canary: str = "none"
    gguf: GgufWritten | None = None


def export(
    source: Path,
    output: Path,
    config: ExportConfig | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the adapter of a run (or of an earlier export) into `output`, in the form asked for.

    The files are the same, byte for byte, in every process. The source is checked against its own manifest first. Where
    the base is here, the manifest gets a fingerprint of the adapter's answers (`reference.fingerprint`).
    base: whose config.json a file for llama.cpp needs, where it is not the one that the adapter names; the fingerprint
    is taken on it too. Raises InputError for an unfinished run, MismatchError for a damaged one, OutputError for an
    existing output, and what `write_gguf` raises.
    """
    config = config or ExportConfig()
    if source.name.endswith(".partial") and source.is_dir() and not (source / "adapter").exists():
        raise InputError("the run is not finished", code="GS-347", file=source, hint="its run.json says how it stands")
    folder = find_adapter(source)
    check_folder(folder)
    trained = read_adapter(folder)
    named = Path(trained.base.name)
    links = [path for path in folder.iterdir() if path.is_symlink()]
    protected = [source, *links, *([named] if named.exists() else [])]
    settings = _settings(trained, base) if config.gguf else None
    return export_adapter(trained, output, config, gguf_for=settings, overwrite=overwrite, protect=protected)


def _settings(trained: Adapter, base: str | None) -> Base:
    """Return the base with its config.json, of the hub at the adapter's revision."""
    need_gguf()
    revision = trained.base.revision
    try:
        found = locate_settings(base or (f"{trained.base.name}@{revision}" if revision else trained.base.name))
    except (MachineError, UsageError) as err:
        if base is not None:
            raise
        here = f"--base BASE, where the base is now: {trained.base.name!r} is what the adapter calls it"
        raise err.advising(f"{here}; or {err.fields['try']}" if "try" in err.fields else here) from err
    base_config(trained, found)
    return found


def export_adapter(
    adapter: Adapter,
    output: Path,
    config: ExportConfig | None = None,
    *,
    gguf_for: Base | None = None,
    overwrite: bool = False,
    protect: Sequence[Path] = (),
) -> Exported:
    """Write an adapter, whoever trained it, as `export` does: tensors, configuration, model card and seal.

    gguf_for: the base, which a file for llama.cpp needs. `output` must not lie in or above a folder of
    `protect`. Raises OutputError for an existing output, MachineError (GS-560) where the disk has no room for it,
    UsageError (GS-239) for a path that is not UTF-8 with a file for llama.cpp.
    """
    config = config or ExportConfig()
    assert gguf_for is not None or not config.gguf, "a file for llama.cpp needs the base"
    wanted = written_bytes(adapter, config.form, getattr(torch, config.dtype))
    require_space(output, 2 * wanted if config.gguf else wanted)
    if config.gguf:
        check_is_unicode(output)  # the file is read back by a library
    base = _fingerprinted_on(adapter, gguf_for)
    with staged_folder(output, overwrite=overwrite, protect=protect) as stage:
        root = write_adapter(stage, adapter, config.form, getattr(torch, config.dtype))
        write_text(stage / "README.md", model_card(adapter, config.form))
        gguf = write_gguf(stage / GGUF, adapter, gguf_for, config.dtype) if config.gguf and gguf_for else None
        canary, told = fingerprint(stage, base, adapter.base.roots, config)
        record = seal_record(root, adapter.base, adapter.origin, config)
        seal_folder(stage, record | ({"canary": canary} if canary else {}))
    return Exported(output, root, adapter, f"{'stored' if canary else 'none'}: {told}", gguf)


def _fingerprinted_on(adapter: Adapter, gguf_for: Base | None) -> Path | None:
    """Return where the base may lie with its weights: the folder that was given, or that the adapter names."""
    if gguf_for is not None and gguf_for.revision is None:  # of a hub id only settings are here
        return gguf_for.path
    return Path(adapter.base.name) if adapter.base.name else None
