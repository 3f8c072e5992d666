"""Where an output may be written: never onto, into or around an input or a model, never over what is not ours."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from gora_serve.errors import InputError, OutputError, UsageError
from gora_serve.integrity.canonical import is_unicode, read_json

UNCHANGED = "nothing was changed"
SEAL = "gora_manifest.json"  # what a finished output folder of ours holds
SEAL_LIMIT = 64 << 20  # bytes
SEAL_SCHEMA = "gora-serve/output-manifest/1"
_OURS = "gora-serve/"  # how the schema of each JSON file of ours begins
_RUN = "run.json"  # what a run, or a probe, has for a seal
_OF_RUNS = {_RUN, "metrics.jsonl", "gamma.json", "ranks.json", "probe.json", "statistics.safetensors"}
_WITHIN_RUNS = ("adapter", "probe", "checkpoints")  # sealed folders, or folders of such
_LOGS = ("tracking", "wandb")  # folders of trackers, whose files have names of their own
_ADDED = {SEAL, "README.md", "merge.json", "conversion.json", ".gitattributes"}  # what a seal need not list


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
        if is_model(folder):
            raise model_in_the_way(target, f"the output lies in a model folder, {folder}")
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
        raise model_in_the_way(target, "the output is a model folder")
    for place in (Path.cwd(), Path.home()):
        if _relation(target, place) in ("is", "contains"):
            what = f"the output to be replaced is or contains {place}"
            raise UsageError(what, code="GS-254", file=target, kept=UNCHANGED)
    for parent, folders, _ in os.walk(target):
        for name in folders:
            if is_model(Path(parent, name)):
                raise model_in_the_way(target, f"the folder to be replaced holds a model, {Path(parent, name)}")
    foreign = _foreign(target)
    if foreign is not None:
        hint = "choose another output; --overwrite replaces whole outputs of gora-serve, and nothing else"
        raise UsageError(
            "the folder to be replaced holds other things", code="GS-257", file=target, actual=foreign,
            kept=UNCHANGED, hint=hint,
        )  # fmt: skip


def check_is_unicode(output: Path) -> None:
    """Raise UsageError (GS-239) for an output whose files the safetensors library could not open."""
    if not is_unicode(str(output.absolute())):
        raise UsageError(
            "the path of the output is not UTF-8, and the safetensors library opens no other", code="GS-239",
            file=output, hint="choose another name for the output, or another folder",
        )  # fmt: skip


def _foreign(folder: Path) -> str | None:
    """Return the first file in `folder` that is not of an output of ours, by its path there; None where there is none.

    A sealed folder holds the files that its seal lists; a run those of runs, and sealed folders. Contents are not read.
    """
    listed = _listed(folder / SEAL)
    is_run = str(_object(folder / _RUN).get("schema", "")).startswith(_OURS)
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if is_run and entry.is_dir() and not entry.is_symlink() and name in (*_WITHIN_RUNS, *_LOGS):
            inner = None if name in _LOGS else _foreign_within(entry)
        else:
            inner = next((one for one in _files_at(entry) if not _belongs(one, listed, is_run=is_run)), None)
        if inner is not None:
            return inner if name not in _WITHIN_RUNS or not is_run else f"{name}/{inner}"
    return None


def _foreign_within(folder: Path) -> str | None:
    """Return the same of a folder in a run: one that is sealed, or one of sealed folders."""
    if (folder / SEAL).is_file():
        return _foreign(folder)
    for entry in sorted(folder.iterdir()):
        is_folder = entry.is_dir() and not entry.is_symlink()
        inner = _foreign(entry) if is_folder else ""
        if inner is not None:
            return f"{entry.name}/{inner}" if is_folder else entry.name
    return None


def _files_at(entry: Path) -> Iterator[str]:
    """Yield the file, or the files below the folder, by their path from the folder that `entry` lies in."""
    if entry.is_symlink() or not entry.is_dir():
        yield entry.name
        return
    for place, folders, names in os.walk(entry):
        for name in sorted([*names, *(one for one in folders if Path(place, one).is_symlink())]):
            yield Path(place, name).relative_to(entry.parent).as_posix()


def _belongs(name: str, listed: Collection[str] | None, *, is_run: bool) -> bool:
    if is_run and name in _OF_RUNS:
        return True
    return listed is not None and (name in listed or name in _ADDED or name.startswith(".cache/huggingface/"))


def _listed(seal: Path) -> Collection[str] | None:
    """Return the names that a seal of ours lists, of this version or of another; None where it is no such seal."""
    value = _object(seal)
    files = value.get("files")
    is_ours = str(value.get("schema", "")).startswith(SEAL_SCHEMA.rpartition("/")[0])
    return files if is_ours and isinstance(files, dict) else None


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none."""
    try:
        value = read_json(path, limit=SEAL_LIMIT) if path.is_file() else {}
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def model_in_the_way(target: Path, what: str) -> UsageError:
    """Return the error (GS-256) for an output that is, lies in or would replace a model's folder."""
    hint = "choose another output; nothing is written into a model folder, and none is replaced"
    return UsageError(what, code="GS-256", file=target, kept=UNCHANGED, hint=hint)


def is_model(folder: Path) -> bool:
    """Return whether a model lies in the folder: whatever the inputs are, it may be somebody's base."""
    weights = ("model.safetensors", "pytorch_model.bin")
    names = (*weights, *(f"{name}.index.json" for name in weights))
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
