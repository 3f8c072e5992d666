"""Where an output may be written: never onto, into or around an input or a model, never over what is not ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gora_serve.errors import OutputError, UsageError

UNCHANGED = "nothing was changed"
SEAL = "gora_manifest.json"  # what a finished output folder of ours holds
REPLACEABLE = (SEAL, "run.json", "adapter_config.json")  # one of these is in a folder that --overwrite may replace


def check_target(target: Path, *, overwrite: bool = False, protect: Sequence[Path] = (), resume: bool = False) -> None:
    """Raise UsageError or OutputError if `staged_folder` would refuse `target` before work starts; changes nothing."""
    if target.name in ("", ".."):
        raise UsageError("the output needs a name of its own", code="GS-255", file=target, hint="name a folder")
    if target.is_symlink():
        raise UsageError(
            "the output is a symlink", code="GS-252", file=target, hint="name the folder that it points to"
        )
    for path in protect:
        relation = _relation(target, path)
        if relation:
            hint = "choose an output folder outside the inputs"
            what = f"the output {relation} an input, {path}"
            raise UsageError(what, code="GS-251", file=target, kept=UNCHANGED, hint=hint)
    for folder in Path(os.path.realpath(target)).parents:
        if _is_model(folder):
            raise _model(target, f"the output lies in a model folder, {folder}")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError("the output is not a folder", code="GS-253", file=target, kept=UNCHANGED)
    if not overwrite:
        hint = "choose another output, or pass --overwrite"
        if resume:
            hint = "it is complete, there is nothing to resume; to start anew: --overwrite without --resume"
        raise OutputError("the output exists", code="GS-601", file=target, kept=UNCHANGED, hint=hint)
    if (target / "config.json").exists() and not (target / SEAL).exists():
        raise _model(target, "the output is a model folder")
    for place in (Path.cwd(), Path.home()):
        if _relation(target, place) in ("is", "contains"):
            what = f"the output to be replaced is or contains {place}"
            raise UsageError(what, code="GS-254", file=target, kept=UNCHANGED)
    if any(target.iterdir()) and not any((target / mark).exists() for mark in REPLACEABLE):
        hint = "choose another output; --overwrite replaces runs and adapters, and nothing else"
        raise UsageError(
            "the folder to be replaced holds other things", code="GS-257", file=target, kept=UNCHANGED, hint=hint
        )
    for parent, folders, _ in os.walk(target):
        for name in folders:
            if _is_model(Path(parent, name)):
                raise _model(target, f"the folder to be replaced holds a model, {Path(parent, name)}")


def _model(target: Path, what: str) -> UsageError:
    hint = "choose another output; nothing is written into a model folder, and none is replaced"
    return UsageError(what, code="GS-256", file=target, kept=UNCHANGED, hint=hint)


def _is_model(folder: Path) -> bool:
    """Return whether a model lies in the folder: whatever the inputs are, it may be somebody's base."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return os.path.lexists(folder / "config.json") and any(os.path.lexists(folder / name) for name in names)


def _relation(target: Path, other: Path) -> str | None:
    """Return "is", "contains" or "lies in" as `target` does so with `other`, by path and by (device, inode)."""
    real, real_other = Path(os.path.realpath(target)), Path(os.path.realpath(other))
    ids, ids_other = _identities(real), _identities(real_other)
    if real == real_other or (ids[0] is not None and ids[0] == ids_other[0]):
        return "is"
    if real in real_other.parents or (ids[0] is not None and ids[0] in ids_other):
        return "contains"
    if real_other in real.parents or (ids_other[0] is not None and ids_other[0] in ids):
        return "lies in"
    return None


def _identities(real: Path) -> list[tuple[int, int] | None]:
    """Return (device, inode) of the path and of each of its parents, None where there is nothing."""
    result: list[tuple[int, int] | None] = []
    for path in (real, *real.parents):
        try:
            status = path.stat()
            result.append((status.st_dev, status.st_ino))
        except OSError:
            result.append(None)
    return result
