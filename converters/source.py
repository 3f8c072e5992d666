"""Finding and opening a foreign checkpoint: which file holds its tensors, and what is refused before any is read.

Refused here, each with its way out: Git LFS pointers, files cut short, pickles that nobody allowed, leftovers of ZeRO
and FSDP, folders that hold no adapter. What the tensors mean is the families' business.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.adapter.tensors import TensorFiles
from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.layout import INDEX, SINGLE, find_model

CONFIG = "adapter_config.json"
SAFETENSORS = ("adapter_model.safetensors", "adapters.safetensors")
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_0.pt")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was opened: its folder, its configuration ({} where it has none) and its tensors, unread.

    weights: the file of the tensors, for messages; of a model in several files, its folder. config_file: where the
    configuration is, or would be. files: all files of the tensors.
    """

    folder: Path
    weights: Path
    config: Mapping[str, Any]
    tensors: TensorFiles

    @property
    def files(self) -> list[Path]:
        return sorted(set(self.tensors.files.values()))

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG


def open_source(path: Path, *, pickles: bool = False) -> Source:
    """Open an adapter: a folder, or one safetensors file; or a whole model's folder (a full fine-tune).

    Raises MachineError (GS-540) where there is nothing, InputError for what is refused.
    """
    if not path.exists():
        raise MachineError(
            "there is no such file or folder", code="GS-540", file=path, hint="check the path of the adapter"
        )
    folder = path if path.is_dir() else path.parent
    if is_model(path):
        return Source(path, path, {}, TensorFiles(find_model(path).weights.values()))
    weights = path if path.is_file() else _weights_of(path)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if not isinstance(config, dict):
        raise InputError(
            "adapter_config.json is not an object", code="GS-3107", file=folder / CONFIG, hint="fetch the adapter again"
        )
    return Source(folder, weights, config, TensorFiles([weights]))


def is_model(folder: Path) -> bool:
    """Tell whether a folder holds a whole model and no adapter."""
    has_adapter = any((folder / name).exists() for name in (CONFIG, *SAFETENSORS))
    return not has_adapter and any((folder / name).is_file() for name in (SINGLE, INDEX))


def _weights_of(folder: Path) -> Path:
    for name in SAFETENSORS:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir())
    raise InputError(
        "this folder holds no adapter", code="GS-3101", file=folder, expected=" or ".join(SAFETENSORS),
        actual=", ".join(names[:8]) or "an empty folder", hint="give the folder that the adapter was saved in",
    )  # fmt: skip


def is_pickle(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)
