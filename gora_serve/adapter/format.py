"""The only reader and writer of adapter folders: adapter_model.safetensors and adapter_config.json.

Writing is byte-reproducible: the same adapter gives the same files in every process. The three forms of
`--form` hold the same update and differ only in how scale and rank are spelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import gora_serve
from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.linalg import fold_scale, pad_rank
from gora_serve.adapter.names import parse_key, tensor_key
from gora_serve.adapter.peft_config import make_config, read_scales
from gora_serve.config import Form
from gora_serve.errors import InputError
from gora_serve.integrity.canonical import canonical_json, read_json
from gora_serve.integrity.files import write_bytes, write_json
from gora_serve.integrity.headers import TensorEntry, encode_header, read_header
from gora_serve.integrity.manifest import TensorRecord, tensor_digest, weights_root
from gora_serve.integrity.record import RECORD_SCHEMA, WEIGHTS, binding_json, bound_roots, read_record

CONFIG = "adapter_config.json"
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that every engine reading PEFT LoRA can hold
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def to_form(adapter: Adapter, form: Form) -> Adapter:
    """Return the adapter spelled as `form`: the update stays the same.

    unit: scale folded into B. padded: the same, and every module zero-padded to one common rank of ENGINE_RANKS.
    native: as trained. Raises InputError if a rank is above 512 in padded form.
    """
    if form == "native":
        return adapter
    modules = {path: fold_scale(factors) for path, factors in adapter.modules.items()}
    if form == "padded":
        widest = max(adapter.ranks.values())
        rank = next((rank for rank in ENGINE_RANKS if rank >= widest), None)
        if rank is None:
            raise InputError(
                "rank is too large for the padded form", code="GS-357", expected=f"at most {ENGINE_RANKS[-1]}",
                actual=widest, hint="export with --form unit",
            )  # fmt: skip
        modules = {path: pad_rank(factors, rank) for path, factors in modules.items()}
    return _with_modules(adapter, modules)


def _with_modules(adapter: Adapter, modules: Mapping[str, LoraFactors]) -> Adapter:
    return Adapter(modules, adapter.base, adapter.carried, adapter.origin, adapter.task_type, adapter.fan_in_fan_out)


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the adapter with A and B rounded to `dtype`. Raises InputError if a finite value overflows."""
    modules = {}
    for path, factors in adapter.modules.items():
        A, B = factors.A.to(dtype), factors.B.to(dtype)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise InputError(
                f"the adapter holds values that {dtype} cannot", code="GS-358", tensor=path,
                hint="export with --dtype float32 or bfloat16; NaN in the run means that training diverged",
            )  # fmt: skip
        modules[path] = LoraFactors(A, B, factors.scale)
    return _with_modules(adapter, modules)


def write_adapter(folder: Path, adapter: Adapter, form: Form, dtype: torch.dtype = torch.float32) -> str:
    """Write adapter_model.safetensors and adapter_config.json into an existing folder; return the adapter root.

    The scale is folded before the tensors are rounded to `dtype`, once.
    Raises InputError if no module has an adapter, and OSError from the disk.
    """
    if not adapter.modules:
        raise InputError("the adapter has no module", code="GS-359", hint="raise --rank-min to 1 or more")
    adapter = cast(to_form(adapter, form), dtype)
    tensors = _tensors(adapter)
    blobs = {key: _little_endian(tensor) for key, tensor in tensors.items()}
    root = weights_root(
        {
            key: TensorRecord(DTYPES[t.dtype], tuple(t.shape), len(blobs[key]), tensor_digest([blobs[key]]))
            for key, t in tensors.items()
        }
    )
    layout = [(key, DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()]
    metadata = {"format": "pt", "gora_serve": canonical_json(_record(adapter, root)).decode()}
    write_bytes(folder / WEIGHTS, encode_header(layout, metadata) + b"".join(blobs.values()))
    config = make_config(
        adapter.ranks,
        {path: factors.scale for path, factors in adapter.modules.items()},
        base_name=adapter.base.name,
        revision=adapter.base.revision,
        task_type=adapter.task_type,
        fan_in_fan_out=adapter.fan_in_fan_out,
    )
    write_json(folder / CONFIG, config)
    return root


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = dict(adapter.carried)
    for path, factors in adapter.modules.items():
        tensors[tensor_key(path, "A")] = factors.A
        tensors[tensor_key(path, "B")] = factors.B
    return {key: tensors[key] for key in sorted(tensors)}


def _little_endian(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _record(adapter: Adapter, root: str) -> dict[str, Any]:
    """The binding that travels inside the weights file: which base, by its roots, and which adapter."""
    return {
        "schema": RECORD_SCHEMA,
        "adapter_root": root,
        "base": binding_json(adapter.base.name, adapter.base.revision, adapter.base.roots),
        "origin": dict(adapter.origin),
        "tool": f"gora-serve {gora_serve.__version__}",
    }


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that gora-serve wrote, in any form. Raises InputError naming file and tensor.

    Adapters of other tools go through the converters.
    """
    weights, config_file = folder / WEIGHTS, folder / CONFIG
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise InputError("adapter_config.json is not an object", code="GS-360", file=config_file)
    header = read_header(weights)
    pairs = _pairs(header.entries, weights)
    tensors = load_file(weights)
    ranks = {path: tensors[tensor_key(path, "A")].shape[0] for path in pairs}
    scales = read_scales(config, ranks, file=config_file)
    modules = {
        path: LoraFactors(tensors[tensor_key(path, "A")], tensors[tensor_key(path, "B")], scales[path])
        for path in pairs
    }
    record = read_record(header.metadata, weights)
    return Adapter(
        modules,
        _base_id(config, record),
        origin=record.get("origin", {}),
        task_type=config.get("task_type"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def _pairs(entries: Mapping[str, TensorEntry], file: Path) -> list[str]:
    """Return the module paths, in order. Raises InputError for a tensor that is no factor, or lacks its twin."""
    parts: dict[str, set[str]] = {}
    for key, entry in entries.items():
        parsed = parse_key(key)
        if parsed is None or len(entry.shape) != 2 or entry.dtype not in DTYPES.values():
            raise InputError(
                "a tensor that is no LoRA factor", code="GS-361", file=file, tensor=key,
                hint="only exports of this tool are read here; export the run again",
            )  # fmt: skip
        parts.setdefault(parsed[0], set()).add(parsed[1])
    for path, found in parts.items():
        if found != {"A", "B"}:
            missing = tensor_key(path, "B" if "A" in found else "A")
            raise InputError("a LoRA factor lacks its twin", code="GS-362", file=file, tensor=missing)
    if not parts:
        raise InputError("the adapter holds no tensor", code="GS-359", file=file)
    return list(parts)


def _base_id(config: Mapping[str, Any], record: Mapping[str, Any]) -> BaseId:
    return BaseId(str(config.get("base_model_name_or_path") or ""), config.get("revision"), bound_roots(record))
