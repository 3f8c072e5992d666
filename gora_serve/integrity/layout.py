"""Which files of a folder are the model: one safetensors file, or the shards that an index names.

Paths are confined to the folder; the symlinks of a Hugging Face hub snapshot may also lead into that repository's
blobs, and into the store that the cache's repositories share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gora_serve.errors import InputError, MachineError, listed
from gora_serve.integrity.canonical import MIB, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_LIMIT = 64 * MIB  # bytes; an index of 100,000 tensors has about 10 MiB


@dataclass(frozen=True)
class ModelFiles:
    """The weight files of a model folder: relative POSIX name -> real path; `placed` is the index's tensor -> file."""

    weights: Mapping[str, Path]
    placed: Mapping[str, str] | None


def find_model(directory: Path) -> ModelFiles:
    """Return the weight files of the model in `directory`.

    Raises MachineError (GS-503 no such folder, GS-504 shards missing) and InputError (GS-322 not a model, GS-323 only
    pickles, GS-324 malformed index, GS-325 a path that leaves the folder, GS-3290 two models in one folder).
    """
    if not directory.is_dir():
        raise MachineError("there is no such folder", code="GS-503", file=directory, hint="check the path")
    if (directory / SINGLE).exists():
        placed = _read_index(directory / INDEX) if (directory / INDEX).exists() else None
        if placed is not None and set(placed.values()) != {SINGLE}:
            raise _two_models(directory, placed)
        return ModelFiles({SINGLE: confined(directory, SINGLE)}, placed)
    if not (directory / INDEX).exists():
        raise _not_a_model(directory)
    placed = _read_index(directory / INDEX)
    paths = {name: confined(directory, name) for name in sorted(set(placed.values()))}
    missing = [name for name, path in paths.items() if not os.path.exists(path)]  # noqa: PTH110 - no error for long names
    if missing:
        raise MachineError(
            f"{len(missing)} of {len(paths)} weight files are missing: {', '.join(missing)}", code="GS-504",
            file=directory, hint="download the model again; an interrupted download continues where it stopped",
        )  # fmt: skip
    return ModelFiles(paths, placed)


def _two_models(directory: Path, placed: Mapping[str, str]) -> InputError:
    others = sorted(set(placed.values()) - {SINGLE})
    return InputError(
        f"the folder holds {SINGLE} and an index that names other files: transformers reads the one, vLLM the others",
        code="GS-3290", file=directory, expected=f"{SINGLE}, or {INDEX} and its files", actual=listed(others),
        hint="move away what is a leftover, or fetch the model again into an empty folder",
    )  # fmt: skip


def other_weights(directory: Path) -> list[str]:
    """Return the safetensors files beside the model's own ones: no part of what is hashed, though a program that reads
    every file would load them (hidden ones it would not). Raises as `find_model`."""
    own = find_model(directory).weights
    found = (path.name for path in directory.glob("*.safetensors"))
    return sorted(name for name in found if name not in own and not name.startswith("."))


def _not_a_model(directory: Path) -> InputError:
    names = sorted(path.name for path in directory.iterdir())
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        hint = (
            f'where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('NEW_FOLDER')\", and copy the tokenizer files"
        )
        what = "this model has only pytorch_model.bin; pickles can run code and are not read"
        return InputError(what, code="GS-323", file=directory, expected=SINGLE, hint=hint)
    hint = "pass the folder that save_pretrained or a hub download made"
    if "adapter_config.json" in names:
        hint = "this is an adapter folder; pass its base model"
    elif any(name.endswith(".gguf") for name in names):
        hint = "load the GGUF file with transformers (gguf_file=...) and save_pretrained the result"
    return InputError(
        "this folder is not a model", code="GS-322", file=directory,
        expected=f"{SINGLE} or {INDEX}", actual=listed(names, 8) or "an empty folder", hint=hint,
    )  # fmt: skip


def _read_index(path: Path) -> dict[str, str]:
    value = read_json(path, limit=INDEX_LIMIT)
    placed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise InputError(
            "the index has no weight_map of tensor names to files", code="GS-324", file=path,
            hint="fetch the model again: the index is not whole",
        )  # fmt: skip
    return placed


def confined(directory: Path, name: str) -> Path:
    """Return the real path of `name` in `directory`, symlinks followed; it need not exist.

    Raises InputError (GS-325) when it leaves the folder otherwise than from a hub snapshot into its cache's blobs.
    """
    pure = PurePosixPath(name)
    folder = directory.resolve()
    try:
        if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
            raise _escapes(directory, name)
        real = (folder / pure).resolve()
    except (OSError, RuntimeError) as err:  # a loop of symlinks; RuntimeError before Python 3.13
        raise InputError(
            "this path is a loop of symlinks",
            code="GS-325",
            hint="fetch the file again, in the place of the symlink",
            file=directory / name,
        ) from err
    if not any(real.is_relative_to(place) and real != place for place in (folder, *_blob_folders(folder))):
        raise _escapes(directory, name)
    return real


SHARED_MARK = ".huggingface-shared-blobs"


def _blob_folders(folder: Path) -> list[Path]:
    """Return where the hub cache keeps what the snapshot `folder` links to: nowhere if it is none.

    These are the blobs of its repository and, for files that came through Xet, the store that all repositories share.
    """
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name != "snapshots" or not blobs.is_dir() or blobs.is_symlink():
        return []
    shared = folder.parent.parent.parent / "blobs"
    return [blobs, shared] if (shared / SHARED_MARK).is_file() and not shared.is_symlink() else [blobs]


def blob_name(directory: Path, name: str) -> str | None:
    """Return the name of the hub cache's blob that the file `name` of the snapshot `directory` links to, or None.

    It is what the hub promised: the SHA-256 of a file in LFS or Xet (64 digits), git's SHA-1 of a small one (40).
    """
    path = directory.resolve() / name
    if not path.is_symlink():
        return None
    blob = path.parent / path.readlink()  # one step: a blob may itself be a link, to a name that promises nothing
    is_digest = len(blob.name) in (40, 64) and all(char in "0123456789abcdef" for char in blob.name)
    return blob.name if is_digest and blob.parent.resolve() in _blob_folders(directory.resolve())[:1] else None


def _escapes(directory: Path, name: str) -> InputError:
    return InputError(
        "a weight file lies outside the model's folder", code="GS-325", file=directory, actual=name,
        hint="copy the model into one folder, without symlinks that leave it",
    )  # fmt: skip
