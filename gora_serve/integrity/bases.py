"""From what the user calls a base or an adapter to the folder that holds it: local, or downloaded from the hub."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.hub import is_hub_id, parse_id
from gora_serve.integrity.reading import naming_inputs, unreadable
from gora_serve.integrity.snapshots import ADAPTER, MODEL, SETTINGS, download
from gora_serve.integrity.verify import adapter_of_run


@dataclass(frozen=True)
class Base:
    """Where a base lies on this machine, what it is called, and the hub commit that it is."""

    name: str
    path: Path
    revision: str | None = None


def locate_base(name: str) -> Base:
    """Find BASE: an existing directory, or a hub id (`org/name`, `org/name@REVISION`), downloaded at a fixed commit.

    A download is checked, file by file. Raises InputError for something that is not a model folder, MachineError when
    the hub cannot give it, MismatchError for a damaged file, UsageError for a malformed id.
    """
    return _locate(name, MODEL)


def locate_settings(name: str) -> Base:
    """Find BASE as `locate_base` does, but of a hub id download the JSON files alone: no weights."""
    return _locate(name, SETTINGS)


def locate_adapter(name: str | Path) -> Path:
    """Find ADAPTER: what lies at that path, or a hub id with its revision, downloaded and checked as a base is.

    Of a finished run it is the adapter in it.
    Without `@REVISION` it is a path, whether there is anything or not: a mistyped one never goes to the hub.
    """
    text = str(name)
    if _exists(Path(text)) or _is_path(text) or "@" not in text:
        return adapter_of_run(Path(text))
    return download(parse_id(text), ADAPTER).path


def _is_path(text: str) -> bool:
    """Tell whether the text means a path, there or not."""
    return text.startswith(("/", "./", "../", "~")) or text in ("", ".", "..")


def _locate(name: str, wanted: Sequence[str]) -> Base:
    path = Path(name)
    if name and _exists(path):
        _check_model_folder(path)
        return Base(name, path)
    if _is_path(name) or not ("@" in name or is_hub_id(name)):
        raise MachineError(
            "no such base", code="GS-520", file=name, hint="give a model folder or a hub id such as org/name@main"
        )
    snapshot = download(parse_id(name), wanted)
    _check_model_folder(snapshot.path)
    return Base(snapshot.repo, snapshot.path, snapshot.commit)


def _exists(path: Path) -> bool:
    """Raises MachineError (GS-502) where the folder that it would be in cannot be searched."""
    try:
        return path.exists()
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:
            return False
        raise unreadable(path, err) from err


def _check_model_folder(path: Path) -> None:
    with naming_inputs():
        if path.is_dir():
            next(path.iterdir(), None)  # of a folder that cannot be listed, this says why
        _check_files(path)


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise InputError("not a model: BASE is a file", code="GS-365", file=path, hint="give the model's folder")
    has_config = (path / "config.json").is_file()
    if (path / "adapter_config.json").exists() and not has_config:
        raise InputError(
            "not a model: this folder is an adapter", code="GS-366", file=path, expected="config.json and weights",
            hint="BASE is the untouched model that the adapter was trained on",
        )  # fmt: skip
    if (path / "adapter_config.json").exists():  # transformers would load it on top of the weights
        raise InputError(
            "the base's folder also holds an adapter, which would be loaded with it", code="GS-348",
            file=path / "adapter_config.json", hint="move the adapter out of the base's folder",
        )  # fmt: skip
    if not has_config:
        raise InputError(
            "not a model: no config.json", code="GS-366", file=path,
            hint="give the folder that holds config.json and model.safetensors",
        )  # fmt: skip
