"""Finding and opening a foreign checkpoint: which file holds its tensors, and what is refused before any is read.

Refused here, each with its way out: Git LFS pointers, files cut short, pickles that nobody allowed, leftovers of ZeRO
and FSDP, folders that hold no adapter. What the tensors mean is the families' business.
"""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gora_serve.adapter.format import CARRIED_DTYPES
from gora_serve.adapter.tensors import TensorFiles
from gora_serve.errors import InputError, MachineError, listed
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.headers import TensorEntry
from gora_serve.integrity.layout import INDEX, SINGLE, find_model
from gora_serve.integrity.reading import open_regular

CONFIG = "adapter_config.json"
SAFETENSORS = ("adapter_model.safetensors", "adapters.safetensors")
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_0.pt", "final.ckpt")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NESTED = "model_state_dict"  # where MyTransformers keeps the tensors, beside the state of its optimizer
ZERO = ("zero_to_fp32.py", "global_step*", "*zero_pp_rank_*", "mp_rank_*_model_states.pt")
FSDP = ("pytorch_model_fsdp_*", "*.distcp", ".metadata")
STUB = 256  # bytes: a weights file of a process that held no weights has a header and nothing else


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
    if not path.is_dir():
        with open_regular(path):  # no device and no pipe
            pass
        if path.suffix == ".json":
            raise InputError(
                "this is a JSON file, and an adapter's numbers are in its weights", code="GS-3196", file=path,
                expected="a folder, or a .safetensors file", hint=f"give the folder: {path.parent}",
            )  # fmt: skip
    folder = path if path.is_dir() else path.parent
    if is_model(path):
        return Source(path, path, {}, _whole(path, TensorFiles(find_model(path).weights.values())))
    weights = path if path.is_file() else _weights_of(path)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if not isinstance(config, dict):
        raise InputError(
            "adapter_config.json is not an object", code="GS-3107", file=folder / CONFIG, hint="fetch the adapter again"
        )
    if isinstance(kind := config.get("peft_type"), str):  # written by hand, in small letters
        config["peft_type"] = kind.upper()
    return Source(folder, weights, config, _whole(folder, _open_tensors(weights, pickles=pickles)))


def is_model(folder: Path) -> bool:
    """Tell whether a folder holds a whole model and no adapter."""
    has_adapter = any((folder / name).exists() for name in (CONFIG, *SAFETENSORS))
    return not has_adapter and any((folder / name).is_file() for name in (SINGLE, INDEX))


def _weights_of(folder: Path) -> Path:
    found = next((folder / name for name in (*SAFETENSORS, *PICKLES) if (folder / name).is_file()), None)
    _refuse_leftovers(folder, found)
    if found is not None:
        return found
    if any(folder.glob("pytorch_model*.bin")):
        find_model(folder)  # GS-323: a whole model as pickles, with the way to safetensors
    names = sorted(path.name for path in folder.iterdir())
    inner = [str(path.relative_to(folder)) for path in _adapters_in(folder)]
    raise InputError(
        "this folder holds no adapter", code="GS-3101", file=folder, expected=" or ".join(SAFETENSORS),
        actual=listed(names, 8) or "an empty folder",
        hint=f"give one of the folders in it: {', '.join(inner[-8:])}" if inner
        else "give the folder that the adapter was saved in",
    )  # fmt: skip


def _adapters_in(folder: Path) -> list[Path]:
    """Return the folders of adapters right in this one: a run's checkpoints in their order, an adapter by its name."""
    found = {file.parent for name in (*SAFETENSORS, *PICKLES) for file in folder.glob(f"*/{name}")}

    def order(path: Path) -> tuple[int, str]:
        number = path.name.rpartition("-")[2]
        return int(number) if number.isdecimal() and len(number) < 18 else -1, path.name

    return sorted(found, key=order)


def _refuse_leftovers(folder: Path, weights: Path | None) -> None:
    """Raise InputError where the weights are still in the shares of several processes: GS-3111 ZeRO, GS-3112 FSDP."""
    if weights is not None and weights.stat().st_size > STUB:
        return
    if found := _first(folder, ZERO):
        raise _shares_of_zero(found)
    if found := _first(folder, FSDP):
        raise InputError(
            "the weights are in FSDP's shares, one for each process", code="GS-3112", file=found,
            hint="accelerate merge-weights FOLDER OUTPUT, and save the adapter from the merged weights",
        )  # fmt: skip


def _whole(folder: Path, tensors: TensorFiles) -> TensorFiles:
    """Return the tensors. Raises InputError (GS-3111) where ZeRO-3 left a name without content, as (0,) for a matrix.

    Tensors below its threshold stay whole: the file may be of any size.
    """
    for name, entry in tensors.entries.items():
        if entry.shape == (0,):
            raise _shares_of_zero(_first(folder, ZERO) or tensors.files[name], name)
    return tensors


def _first(folder: Path, patterns: Iterable[str]) -> Path | None:
    return next((found for pattern in patterns for found in sorted(folder.glob(pattern))), None)


def _shares_of_zero(file: Path, tensor: str | None = None) -> InputError:
    return InputError(
        "the weights are in DeepSpeed's shares, one for each process", code="GS-3111", file=file, tensor=tensor,
        actual="shape (0,) in the file of one process" if tensor else None,
        hint="in its folder: python zero_to_fp32.py . OUTPUT; save the adapter from the model that it writes",
    )  # fmt: skip


class PickledTensors(TensorFiles):
    """The tensors of a .bin, .pt or .ckpt file, opened by torch's loader for weights only; mapped but for old ones."""

    def __init__(self, path: Path) -> None:
        """Raises InputError (GS-3114) for what is no file of tensors, or holds other objects."""
        super().__init__(())
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as err:  # of a damaged file, nearly any: KeyError, struct.error, BadZipFile ...
            if isinstance(err, OSError) and err.errno != errno.EINVAL:
                raise
            raise _no_tensors(path, _reason(err)) from err
        value = value[NESTED] if isinstance(value, dict) and NESTED in value else value
        if not isinstance(value, dict) or not all(map(_is_named_tensor, value.items())):
            raise _no_tensors(path, "other objects than tensors")
        self._tensors: dict[str, Tensor] = value
        for name, tensor in value.items():
            dtype = CARRIED_DTYPES.get(tensor.dtype, str(tensor.dtype))
            self.entries[name] = TensorEntry(name, dtype, tuple(tensor.shape), 0, tensor.nbytes)
            self.files[name] = path

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def _is_named_tensor(item: tuple[object, object]) -> bool:
    """Tell whether this is a tensor whose numbers are all in the file: no sparse one, none without data, no large view
    of few numbers."""
    name, value = item
    if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _reason(err: Exception) -> str:
    """Return why torch's loader refused, without its advice to load the file unchecked."""
    text = str(err)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it would call or build {found[1]}"
    if "weights_only" in text:
        return "what the loader for weights only does not know"
    return text.partition("\n")[0] or "it ends early"


def _no_tensors(path: Path, actual: str) -> InputError:
    return InputError(
        "this pickle is no plain file of tensors", code="GS-3114", file=path, actual=actual,
        hint="save the adapter as safetensors with the tool that wrote it",
    )  # fmt: skip


def _open_tensors(weights: Path, *, pickles: bool) -> TensorFiles:
    if weights.suffix not in PICKLED:
        return TensorFiles([weights])
    if not pickles:
        raise InputError(
            "this file is a pickle; pickles can run code and are not opened unasked", code="GS-3110", file=weights,
            hint="--allow-pickle opens it by torch's loader for weights only, where you trust it",
        )  # fmt: skip
    return PickledTensors(weights)
