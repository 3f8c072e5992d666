"""The only reader and writer of adapter folders: adapter_model.safetensors and adapter_config.json.

Writing is byte-reproducible: the same adapter gives the same files in every process. The three forms of
`--form` hold the same update and differ only in how scale and rank are spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gora_serve
from gora_serve.adapter.engine_ranks import LARGEST_RANK, padded_rank
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors, raw_bytes
from gora_serve.adapter.linalg import fold_scale, pad_rank
from gora_serve.adapter.names import (
    embedding_key,
    holders,
    parse_embedding_key,
    parse_key,
    saved_as,
    saved_key,
    tensor_key,
)
from gora_serve.adapter.peft_config import make_config, read_scales, saved_modules
from gora_serve.adapter.tensors import TensorFiles
from gora_serve.config import ExportConfig, Form
from gora_serve.errors import InputError
from gora_serve.integrity.canonical import canonical_json, read_json
from gora_serve.integrity.files import write_json, write_stream
from gora_serve.integrity.headers import encode_header
from gora_serve.integrity.manifest import TensorRecord, tensor_digest, weights_root
from gora_serve.integrity.record import (
    ASSERTED,
    RECORD_SCHEMA,
    WEIGHTS,
    binding_json,
    bound_roots,
    claim_of,
    read_record,
)

CONFIG = "adapter_config.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CARRIED_DTYPES = {**DTYPES, torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


def to_form(adapter: Adapter, form: Form) -> Adapter:
    """Return the adapter spelled as `form`: the update stays the same. Modules are computed when they are asked for.

    unit: scale folded into B. padded: the same, and every module zero-padded to one common rank (`padded_rank`).
    native: as trained. Raises InputError if a rank is above 512 in padded form.
    """
    if form == "native":
        return adapter
    if form == "unit":
        return _mapped(adapter, fold_scale)
    widest = max(adapter.ranks.values())
    rank = padded_rank(widest)
    if rank is None:
        raise InputError(
            "rank is too large for the padded form", code="GS-357", expected=f"at most {LARGEST_RANK}",
            actual=widest, hint="export with --form unit",
        )  # fmt: skip
    return _mapped(adapter, lambda factors: pad_rank(fold_scale(factors), rank))


def _mapped(adapter: Adapter, change: Callable[[LoraFactors], LoraFactors]) -> Adapter:
    return replace(adapter, modules=LazyModules(adapter.modules, lambda path: change(adapter.modules[path])))


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the adapter with A and B rounded to `dtype`, when they are asked for.

    Reading a module then raises InputError if a finite value overflows.
    """

    def rounded(path: str) -> LoraFactors:
        factors = adapter.modules[path]
        A, B = factors.A.to(dtype), factors.B.to(dtype)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise InputError(
                f"the adapter holds values that {dtype} cannot", code="GS-358", tensor=path,
                hint="export with --dtype float32 or bfloat16; NaN in the run means that training diverged",
            )  # fmt: skip
        return LoraFactors(A, B, factors.scale)

    return replace(adapter, modules=LazyModules(adapter.modules, rounded))


def write_adapter(folder: Path, adapter: Adapter, form: Form, dtype: torch.dtype = torch.float32) -> str:
    """Write adapter_model.safetensors and adapter_config.json into an existing folder; return the adapter root.

    The scale is folded before the tensors are rounded to `dtype`, once; what is carried keeps its own dtype. One
    module is in memory at a time. Raises InputError if no module has an adapter, and OSError from the disk.
    """
    if not adapter.modules:
        raise InputError("the adapter has no module", code="GS-359", hint="raise --rank-min to 1 or more")
    adapter = cast(to_form(adapter, form), dtype)
    ranks, scales = {}, {}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, factors in adapter.modules.items():
        ranks[path], scales[path] = factors.rank, factors.scale
        for key, tensor in _spelled(adapter, path, factors):
            specs[key] = (DTYPES[dtype], tuple(tensor.shape))
    for parameter, tensor in adapter.carried.items():
        if tensor.dtype not in CARRIED_DTYPES:
            raise unusual_type(parameter, str(tensor.dtype))
        specs[saved_key(parameter)] = (CARRIED_DTYPES[tensor.dtype], tuple(tensor.shape))
    root = _write_tensors(folder / WEIGHTS, adapter, specs)
    config = make_config(
        ranks,
        scales,
        base_name=adapter.base.name,
        revision=adapter.base.revision,
        task_type=adapter.task_type,
        fan_in_fan_out=adapter.fan_in_fan_out,
        modules_to_save=saved_as(adapter.carried),
    )
    write_json(folder / CONFIG, config)
    return root


def written_bytes(adapter: Adapter, form: Form, dtype: torch.dtype) -> int:
    """Return how many bytes of tensors `write_adapter` will write."""
    factors = dtype.itemsize * written_parameters(adapter, form)
    return factors + sum(tensor.numel() * tensor.itemsize for tensor in adapter.carried.values())


def written_parameters(adapter: Adapter, form: Form) -> int:
    """Return how many elements A and B have in the file, the zeros of the padded form included."""
    sizes = [(factors.rank, sum(factors.shape)) for factors in adapter.modules.values()]
    padded = padded_rank(max((rank for rank, _ in sizes), default=0)) if form == "padded" else None
    return sum(max(rank, padded or 0) * edges for rank, edges in sizes)


def unusual_type(tensor: str, dtype: str, *, file: Path | None = None) -> InputError:
    """Return the error (GS-3119) for a type that no module is kept in."""
    return InputError(
        "a module that is kept whole has values of an unusual type", code="GS-3119", file=file, tensor=tensor,
        expected=", ".join(CARRIED_DTYPES.values()), actual=dtype, hint="save it in float32",
    )  # fmt: skip


def _spelled(adapter: Adapter, path: str, factors: LoraFactors) -> list[tuple[str, Tensor]]:
    """Return the two tensors of a module under PEFT's keys; of an embedding's update PEFT keeps the transpose."""
    if path in adapter.embeddings:
        return [(embedding_key(path, "A"), factors.B.T), (embedding_key(path, "B"), factors.A.T)]
    return [(tensor_key(path, "A"), factors.A), (tensor_key(path, "B"), factors.B)]


def _write_tensors(file: Path, adapter: Adapter, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Write header and tensors, one by one in the order of their names, and return the adapter root.

    The root is in the header and known last: a header of the same length, with zeros for it, holds the place.
    """
    layout = [(key, *specs[key]) for key in sorted(specs)]
    records: dict[str, TensorRecord] = {}
    with write_stream(file) as stream:
        stream.write(_header(layout, adapter, weights_root({})))
        for key, blob in _blobs(adapter, [key for key, _, _ in layout]):
            dtype, shape = specs[key]
            records[key] = TensorRecord(dtype, shape, len(blob), tensor_digest([blob]))
            stream.write(blob)
        root = weights_root(records)
        stream.seek(0)
        stream.write(_header(layout, adapter, root))
    return root


def _header(layout: Sequence[tuple[str, str, tuple[int, ...]]], adapter: Adapter, root: str) -> bytes:
    return encode_header(layout, {"format": "pt", "gora_serve": canonical_json(_record(adapter, root)).decode()})


def _blobs(adapter: Adapter, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes of each tensor in the order of `keys`; the two of a module follow each other but for chance."""
    modules = {key: path for path in adapter.modules for key in _keys(adapter, path)}
    waiting: dict[str, Tensor] = {}
    for key in keys:
        if key not in modules:
            yield key, raw_bytes(adapter.carried[key.removeprefix(saved_key(""))])
            continue
        if key not in waiting:
            waiting |= _spelled(adapter, modules[key], adapter.modules[modules[key]])
        yield key, raw_bytes(waiting.pop(key))


def _keys(adapter: Adapter, path: str) -> tuple[str, str]:
    key = embedding_key if path in adapter.embeddings else tensor_key
    return key(path, "A"), key(path, "B")


def _record(adapter: Adapter, root: str) -> dict[str, Any]:
    """The binding that travels inside the weights file: which base, by its roots, and which adapter."""
    return {
        "schema": RECORD_SCHEMA,
        "adapter_root": root,
        "base": _binding(adapter.base),
        "origin": dict(adapter.origin),
        "tool": f"gora-serve {gora_serve.__version__}",
    }


def _binding(base: BaseId) -> dict[str, str | None]:
    return binding_json(base.name, base.revision, base.roots, asserted=base.asserted)


def seal_record(root: str, base: BaseId, origin: Mapping[str, str], config: ExportConfig) -> dict[str, object]:
    """Return what the seal of an adapter folder says beside its files: root, form, base, and where it comes from."""
    return {
        "adapter_root": root,
        "form": config.form,
        "dtype": config.dtype,
        "binding": _binding(base),
        "training": dict(origin),
        "tool": f"gora-serve {gora_serve.__version__}",
    }


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that gora-serve wrote, in any form. Its tensors are read when they are asked for.

    Raises InputError naming file and tensor. Adapters of other tools go through the converters.
    """
    weights, config_file = folder / WEIGHTS, folder / CONFIG
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise InputError(
            "adapter_config.json is not an object", code="GS-360", hint="export the adapter again", file=config_file
        )
    tensors = TensorFiles([weights])
    saved = saved_modules(config, file=config_file)
    parts, embeddings, carried = _sorted_out(tensors, saved, weights)
    ranks = {path: tensors.shape(keys["A"])[0] for path, keys in parts.items()}
    scales = read_scales(config, ranks, file=config_file)

    def factors(path: str) -> LoraFactors:
        A, B = tensors[parts[path]["A"]], tensors[parts[path]["B"]]
        return LoraFactors(B.T, A.T, scales[path]) if path in embeddings else LoraFactors(A, B, scales[path])

    modules = LazyModules(parts, factors)
    for path in modules:
        modules[path]  # the shapes fit, or InputError
    record = read_record(tensors.metadata, weights)
    return Adapter(
        modules,
        _base_id(config, record),
        carried={parameter: tensors[key] for parameter, key in carried.items()},
        origin=record.get("origin", {}),
        task_type=config.get("task_type"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        embeddings=frozenset(embeddings),
    )


Parts = dict[str, dict[str, str]]  # module path -> "A" or "B" -> tensor name


def _sorted_out(tensors: TensorFiles, saved: Collection[str], file: Path) -> tuple[Parts, set[str], dict[str, str]]:
    """Return the factors, the paths that are embeddings, and parameter path -> tensor name of what is carried.

    Raises InputError for a tensor that is none of these, or lacks its twin.
    """
    parts: Parts = {}
    embeddings: set[str] = set()
    carried: dict[str, str] = {}
    for key, entry in tensors.entries.items():
        embedding = parse_embedding_key(key)
        parsed = embedding or parse_key(key)
        parameter = key.removeprefix(saved_key(""))
        if parsed is None and not set(saved).isdisjoint(holders(parameter)):
            carried[parameter] = key
            continue
        is_factor = parsed is not None and len(entry.shape) == 2 and entry.dtype in DTYPES.values()
        if parsed is None or not is_factor or parsed[1] in parts.get(parsed[0], {}):
            raise InputError(
                "a tensor that is no LoRA factor", code="GS-361", file=file, tensor=key,
                hint="gora-serve convert ADAPTER --base BASE --output DIR reads adapters of any tool",
            )  # fmt: skip
        parts.setdefault(parsed[0], {})[parsed[1]] = key
        embeddings |= {parsed[0]} if embedding else set()
    for path, found in parts.items():
        if found.keys() != {"A", "B"}:
            missing = "B" if "A" in found else "A"
            key = embedding_key(path, missing) if path in embeddings else tensor_key(path, missing)
            raise InputError(
                "a LoRA factor lacks its twin", code="GS-362", hint="export the adapter again", file=file, tensor=key
            )
    if not parts:
        raise InputError("the adapter holds no tensor", code="GS-359", hint="export the adapter again", file=file)
    return parts, embeddings, carried


def _base_id(config: Mapping[str, Any], record: Mapping[str, Any]) -> BaseId:
    asserted = claim_of(record) == ASSERTED
    name = str(config.get("base_model_name_or_path") or "")
    return BaseId(name, config.get("revision"), bound_roots(record), asserted)
