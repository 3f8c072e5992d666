"""An adapter as llama.cpp loads it (`--lora FILE`): writing adapter_model.gguf, and reading it back to compare.

An edge, through the `gguf` package. llama.cpp adds alpha / r * B (A x), with one alpha for the file and r from each
tensor (llama-adapter.h, get_scale), so that a module's own scale goes into B. One module is in memory at a time.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gora_serve
from gora_serve.adapter.factors import Adapter, LoraFactors
from gora_serve.adapter.linalg import distance, norm
from gora_serve.config import ExportDtype
from gora_serve.deploy.base import check_config
from gora_serve.deploy.gguf_names import Place, architecture_of, places
from gora_serve.deploy.rope_rows import interleave, separate
from gora_serve.errors import BindingError, InputError, MachineError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.roots import config_root

GGUF = "adapter_model.gguf"
# 4 roundings of the dtype, as a share of |scale| |A| |B|: two for the factors, two for what float32 makes of alpha / r
ALLOWED: Mapping[ExportDtype, float] = {"float32": 4 * 2**-24, "bfloat16": 4 * 2**-8, "float16": 4 * 2**-11}


@dataclass(frozen=True)
class GgufWritten:
    """What was written. alpha: of the whole file. error: |read back - exact| / |exact|, over all modules."""

    file: str
    architecture: str
    alpha: float
    modules: int
    error: float


def need_gguf() -> None:
    """Raise MachineError (GS-5450) where the gguf package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise MachineError("--gguf needs the package gguf", code="GS-5450", hint="pip install 'gora-serve[gguf]'")


def write_gguf(file: Path, adapter: Adapter, base: Base, dtype: ExportDtype) -> GgufWritten:
    """Write the adapter for llama.cpp into a new file, and compare what was written with the adapter, in float64.

    The same adapter gives the same bytes. base: of its folder config.json is read, and nothing else. Raises
    MachineError (GS-5450), BindingError (GS-4452) for another base's configuration, InputError: GS-3460 and GS-3461 as
    `places`, GS-3462 for what LoRA files of llama.cpp cannot hold, GS-3463 where the file does not hold the update.
    """
    need_gguf()
    config = base_config(adapter, base)
    if adapter.carried:
        raise InputError(
            "a LoRA file of llama.cpp holds no modules that are carried whole", code="GS-3462",
            tensor=next(iter(adapter.carried)), hint="merge the adapter into the model, and convert the merged model",
        )  # fmt: skip
    architecture, found = architecture_of(config, base.path).name, places(adapter.modules, config, base.path)
    _check_rows(adapter, found)
    alpha = float(max(adapter.ranks.values()))
    _write(file, adapter, found, architecture, alpha, dtype)
    error = _compare(file, adapter, found, dtype)
    return GgufWritten(file.name, architecture, alpha, len(found), error)


def base_config(adapter: Adapter, base: Base) -> dict[str, Any]:
    """Return config.json of the base. Raises BindingError (GS-4452) where it is not the one the adapter is bound to,
    InputError (GS-3402) where a value of it is of the wrong kind."""
    bound = adapter.base.roots.config if adapter.base.roots else None
    actual = config_root(base.path)
    if bound is not None and bound != actual:
        raise BindingError(
            "this is not the configuration of the base that the adapter belongs to", code="GS-4452",
            file=base.path / "config.json", expected=bound, actual=actual, hint="--base BASE names another folder",
        )  # fmt: skip
    config = read_json(base.path / "config.json")
    if not isinstance(config, dict):
        return {}
    check_config(config, base.path / "config.json")
    return config


def _check_rows(adapter: Adapter, found: Mapping[str, Place]) -> None:
    for path, place in found.items():
        rows = adapter.modules[path].shape[0]
        if place.heads and rows % (2 * place.heads):
            raise InputError(
                "the module's rows are not those of whole heads", code="GS-3461", tensor=path,
                expected=f"a multiple of {2 * place.heads}", actual=rows, hint="give the base of the adapter by --base",
            )  # fmt: skip


def _factors(adapter: Adapter, path: str, place: Place, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return lora_a (r, in) and lora_b (out, r), rounded once; of embeddings lora_a is (V, r) and lora_b (d, r)."""
    factors = adapter.modules[path]
    left = factors.B.double() * (factors.scale * factors.rank / alpha)  # (out, r)
    if path in adapter.embeddings:
        return left.to(dtype), factors.A.T.to(dtype)
    return factors.A.to(dtype), interleave(left, place.heads).to(dtype)


def _tensors(
    adapter: Adapter, found: Mapping[str, Place], alpha: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(found, key=lambda path: found[path].name):
        a, b = _factors(adapter, path, found[path], alpha, dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise InputError(
                f"the adapter holds values that {dtype} cannot", code="GS-3463", tensor=path,
                hint="export with --dtype float32 or bfloat16",
            )  # fmt: skip
        yield f"{found[path].name}.lora_a", a.contiguous()
        yield f"{found[path].name}.lora_b", b.contiguous()


def _write(
    file: Path, adapter: Adapter, found: Mapping[str, Place], architecture: str, alpha: float, dtype: ExportDtype
) -> None:
    import gguf

    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    with closing(gguf.GGUFWriter(file, architecture)) as writer:
        for key, value in _metadata(adapter).items():
            writer.add_string(key, value)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"))
        raw = gguf.GGMLQuantizationType[kind]
        for name, tensor in _tensors(adapter, found, alpha, getattr(torch, dtype)):
            array = _array(tensor)
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(adapter, found, alpha, getattr(torch, dtype)):
            writer.write_tensor_data(_array(tensor))


def _array(tensor: Tensor) -> Any:
    """Return numpy's array of a tensor (n, m); bfloat16, which numpy does not have, as its bytes (n, 2 m)."""
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _metadata(adapter: Adapter) -> dict[str, str]:
    roots = adapter.base.roots
    return {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.description": "LoRA adapter, scales folded in",
        "general.base_model.0.name": adapter.base.name,
        "gora_serve.tool": f"gora-serve {gora_serve.__version__}",
        "gora_serve.base.weights_root": roots.weights if roots else "",
        "gora_serve.base.revision": adapter.base.revision or "",
    }


def _compare(file: Path, adapter: Adapter, found: Mapping[str, Place], dtype: ExportDtype) -> float:
    """Read the file as llama.cpp does and return the relative error. Raises InputError (GS-3463)."""
    read = read_gguf(file, {place.name: place.heads for place in found.values()})
    wrong, total = 0.0, 0.0
    if read.keys() != {place.name for place in found.values()}:
        raise _not_held(file, "all modules", "the names in the file differ")
    for path, place in found.items():
        exact, actual = adapter.modules[path], read[place.name]
        size = abs(exact.scale) * float(exact.A.double().norm()) * float(exact.B.double().norm())
        error = distance(actual, exact) if actual.shape == exact.shape else float("inf")
        if not error <= ALLOWED[dtype] * size:
            raise _not_held(file, path, f"|read - exact| {error:.3g} of |A| |B| {size:.3g}")
        wrong, total = wrong + error**2, total + norm(exact) ** 2
    return float((wrong / total) ** 0.5) if total else 0.0


def _not_held(file: Path, path: str, actual: str) -> InputError:
    return InputError(
        "the GGUF file does not hold the adapter's update", code="GS-3463", file=file, tensor=path, actual=actual,
        hint="--dtype float32 or bfloat16; with these too: another version of the package gguf",
    )  # fmt: skip


def read_gguf(file: Path, heads: Mapping[str, int]) -> dict[str, LoraFactors]:
    """Return the updates in a LoRA file by llama.cpp's names of the weights, with its scale: alpha / r, or 1 for 0.

    heads: of the weights whose rows are moved, which is undone here. Of embeddings A and B come as for other modules.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    alpha = float(field.contents()) if field is not None else 0.0
    tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
    found = {}
    for name in sorted({key.rpartition(".lora_")[0] for key in tensors}):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        if name == "token_embd.weight":
            found[name] = LoraFactors(b.T, a, scale)
        else:
            found[name] = LoraFactors(a, separate(b, heads.get(name, 0)), scale)
    return found


def _tensor(tensor: Any) -> Tensor:
    data = torch.from_numpy(tensor.data.copy())
    return data.view(torch.bfloat16) if data.dtype == torch.uint8 else data
