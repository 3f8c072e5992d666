"""How one adapter comes to be served: examined, refused with all that is wrong with it, or copied into the store.

`admit` does it for one adapter, also while an engine runs; `examine` and `keep` are its halves, so that a server that
starts can list the faults of all its adapters at once. What is served has itself passed every check: the copy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from gora_serve.errors import GoraError
from gora_serve.integrity.fingerprint import read_fingerprint
from gora_serve.integrity.reading import changed_while_reading
from gora_serve.integrity.staging import SEAL
from gora_serve.integrity.verify import Verified, verify_adapter, verify_unsealed
from gora_serve.serving.adapter_dir import (
    WEIGHTS_FILE,
    AdapterDir,
    read_adapter_dir,
    require_adapter_files,
    unused_pickles,
)
from gora_serve.serving.fits import fit_errors
from gora_serve.serving.preflight import Fault, as_fault, check_adapter
from gora_serve.serving.same_base import other_base
from gora_serve.serving.served import ServedAdapter, ServedBase, served
from gora_serve.serving.store import Content, Store, rest_of


@dataclass(frozen=True)
class Examined:
    """An adapter and all that is wrong with it. Without a fault there are `adapter`, `verified` and `content`.

    seconds: what looking took.
    """

    name: str
    folder: Path
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...] = ()
    adapter: AdapterDir | None = None
    verified: Verified | None = None
    content: Content | None = None
    seconds: float = 0.0


def examine(name: str, folder: Path, base: ServedBase, *, strict: bool = False) -> Examined:
    """Look for every fault of an adapter: first from configuration and headers, then by reading all bytes.

    Nothing is raised for what is wrong with the adapter. An adapter that gora-serve wrote is held to its manifest and
    to its base; one of another tool gets a warning, or a fault where `strict` is set.
    """
    begun = time.monotonic()
    try:
        require_adapter_files(folder)
        adapter = read_adapter_dir(name, folder)
    except GoraError as err:
        return Examined(name, folder, (as_fault(err, folder),))
    faults = list(check_adapter(adapter, base.path))
    if adapter.pairs:
        faults += [as_fault(err, folder) for err in fit_errors(adapter, base.manifest.tensors, base.architecture)]
    try:
        verified = _verify(folder, base, strict=strict)
        read_fingerprint(verified.canary, folder / SEAL)
    except GoraError as err:
        return Examined(name, folder, (*faults, as_fault(_naming(err, folder), folder)), adapter=adapter)
    if verified.bound_to is None:
        faults += [as_fault(err, folder) for err in other_base(adapter, base.path, base.manifest, base.names)]
    warnings = [f"{name}: {warning}" for warning in verified.warnings]
    warnings += [f"{name}: {pickle} is not used, {WEIGHTS_FILE} is" for pickle in unused_pickles(folder)]
    content = Content(verified.root, rest_of(folder))
    return Examined(name, folder, tuple(faults), tuple(warnings), adapter, verified, content, time.monotonic() - begun)


def _naming(err: GoraError, folder: Path) -> GoraError:
    """Return the error so that it names the adapter, also where its file is one of the base."""
    file = err.fields.get("file")
    if file is None or Path(str(file)).is_relative_to(folder):
        return err
    return err.saying(f"{folder}: {err.what}")


def _verify(folder: Path, base: ServedBase, *, strict: bool) -> Verified:
    if (folder / SEAL).is_file():
        return verify_adapter(folder, base=base.path, base_manifest=base.manifest, strict=strict)
    return verify_unsealed(folder, base=base.path, base_manifest=base.manifest, strict=strict)


def keep(found: Examined, base: ServedBase, store: Store, *, strict: bool = False) -> ServedAdapter:
    """Copy an examined adapter into the store, examine the copy, and return it as it may be loaded.

    Raises MismatchError (GS-101) where the copy is not what was examined.
    """
    begun = time.monotonic()
    entry = store.put(found.folder, content_in(found))
    again = examine(found.name, entry, base, strict=strict)
    if again.faults or again.content != found.content:
        raise changed_while_reading(found.folder / WEIGHTS_FILE)
    seconds = found.seconds + time.monotonic() - begun
    return served_from(replace(found, adapter=again.adapter, seconds=seconds), entry)


def served_from(found: Examined, entry: Path) -> ServedAdapter:
    """Return an examined adapter as it is, or would be, served from its entry in the store."""
    assert found.adapter is not None, "it was refused"
    assert found.verified is not None, "it was refused"
    canary = read_fingerprint(found.verified.canary, found.folder / SEAL)
    return replace(
        served(found.adapter), path=entry, source=found.folder.resolve(), canary=canary, root=found.verified.root,
        verify_seconds=found.seconds,
    )  # fmt: skip


def content_in(found: Examined) -> Content:
    """Return the content of an adapter that has no fault."""
    assert found.content is not None, "it was refused"
    return found.content
