"""From what the user calls a base to the folder that holds it. The hub's own library does the downloading."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import InputError, MachineError


@dataclass(frozen=True)
class Base:
    """Where a base lies on this machine, and what the user called it."""

    name: str
    path: Path
    revision: str | None = None


def locate_base(name: str) -> Base:
    """Find BASE: an existing directory, or a hub id, downloaded (or found in the cache) at a fixed commit.

    Raises InputError for something that is not a model folder, MachineError when the hub cannot be reached.
    """
    return _locate(name, ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])


def locate_settings(name: str) -> Base:
    """Find BASE as `locate_base` does, but of a hub id download the JSON files alone: no weights."""
    return _locate(name, ["*.json"])


def _locate(name: str, wanted: list[str]) -> Base:
    path = Path(name)
    if path.exists():
        _check_model_folder(path)
        return Base(name, path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise MachineError(
            "no such base", code="GS-520", file=name, hint="give a model folder or a hub id such as org/name"
        )
    snapshot = _download(name, wanted)
    _check_model_folder(snapshot)
    commit = snapshot.name if snapshot.parent.name == "snapshots" else None
    return Base(name, snapshot, commit)


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        raise InputError("not a model: BASE is a file", code="GS-365", file=path, hint="give the model's folder")
    if (path / "adapter_config.json").exists():  # transformers would load it on top of the weights
        raise InputError(
            "the base's folder also holds an adapter, which would be loaded with it", code="GS-348",
            file=path / "adapter_config.json", hint="move the adapter out of the base's folder",
        )  # fmt: skip
    if not (path / "config.json").is_file():
        raise InputError(
            "not a model: no config.json", code="GS-366", file=path,
            hint="give the folder that holds config.json and model.safetensors",
        )  # fmt: skip


def _download(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as err:
        raise MachineError(
            "no such directory, and the hub could not give it", code="GS-521", file=name,
            actual=str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__,
            hint="check the spelling, the network and HF_TOKEN; or give the model's folder",
        ) from err  # fmt: skip
