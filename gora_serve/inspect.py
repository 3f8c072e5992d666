"""`inspect`: what an adapter, a run, a probe, a base or a merged model is, as its headers and JSON files say.

No tensor is read. Nothing is hashed and nothing is proved: that is what `verify` is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gora_serve.adapter.engine_ranks import bucket_of
from gora_serve.adapter.names import parse_embedding_key
from gora_serve.adapter.peft_config import foreign_scales
from gora_serve.config import TrainConfig
from gora_serve.errors import GoraError, InputError, listed
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.headers import TensorEntry, read_header
from gora_serve.integrity.layout import INDEX, SINGLE, find_model
from gora_serve.integrity.record import WEIGHTS, bound_roots, claim_of, read_record
from gora_serve.integrity.staging import SEAL, is_held
from gora_serve.serving.adapter_dir import CONFIG_FILE, AdapterDir, read_adapter_dir
from gora_serve.training.run_files import read_probe, standing

RUN, PROBE, CONVERSION, MERGE = "run.json", "probe.json", "conversion.json", "merge.json"
RECEIPT_BYTES = 2**26  # a receipt names every tensor


@dataclass(frozen=True)
class Module:
    """One LoRA module, from the header: its rank, the scale that PEFT gives it (None: not known), (out, in), which for
    embeddings is (V, d)."""

    rank: int
    scale: float | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Inspected:
    """What lies at a path: kind "adapter", "run", "probe", "base" or "merged model". facts: of it as a whole.

    modules: of an adapter, those with factors A and B. notes: what a person should know. adapter: a run's.
    """

    kind: str
    path: Path
    facts: Mapping[str, Any]
    modules: Mapping[str, Module] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapter: Inspected | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `inspect --json` prints."""
        value = {"kind": self.kind, "path": str(self.path), **self.facts, "notes": list(self.notes)}
        if self.kind == "adapter":
            value["modules"] = {path: asdict(module) for path, module in self.modules.items()}
        if self.kind == "run":
            value["adapter"] = self.adapter.to_json() if self.adapter else None
        return value


def inspect(path: Path) -> Inspected:
    """Return what lies at `path`, by its files.

    Raises MachineError (GS-503) where there is no folder, InputError (GS-3197) where it is none of these, and what
    the readers of headers and JSON raise.
    """
    if not path.is_dir():
        find_model(path)  # GS-503
    if (path / PROBE).is_file():  # beside a run.json of its own
        return _probe(path)
    if (path / RUN).is_file():
        return _run(path)
    if (path / CONFIG_FILE).is_file() or (path / WEIGHTS).is_file():
        return _adapter(path)
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return _model(path)
    raise InputError(
        "this folder is neither an adapter, a run, a probe nor a model", code="GS-3197", file=path,
        expected=f"{CONFIG_FILE}, {RUN}, {PROBE}, {SINGLE} or {INDEX}",
        actual=listed(sorted(one.name for one in path.iterdir()), 8) or "an empty folder",
        hint="give the folder that the tool wrote; gora-serve convert also reads files of other tools",
    )  # fmt: skip


def _adapter(path: Path) -> Inspected:
    read = read_adapter_dir(path.name, path)
    header = read_header(read.weights_file)
    record = read_record(header.metadata, read.weights_file)
    modules, notes = _modules(read)
    entries = header.entries.values()
    facts = {
        "type": str(read.config.get("peft_type", "LORA")),
        "initialization": read.config.get("init_lora_weights"),
        **_sizes(entries),
        **_ranks(modules),
        "other_tensors": len(header.entries) - 2 * len(modules),
        "base": _base_of(read, record),
        "sealed": (path / SEAL).is_file(),
        "origin": record.get("origin", {}),
        "converted_from": _receipt(path / CONVERSION).get("family"),
    }
    return Inspected("adapter", path, facts, modules, tuple(notes))


def _modules(read: AdapterDir) -> tuple[dict[str, Module], list[str]]:
    """Return the modules with both factors, and a note where the scales are not known."""
    ranks, shapes = {}, {}
    for path, pair in sorted(read.pairs.items()):
        if pair.A and pair.B and len(pair.A.shape) == len(pair.B.shape) == 2:
            shape = (pair.B.shape[0], pair.A.shape[1])
            ranks[path] = pair.A.shape[0]
            shapes[path] = shape[::-1] if parse_embedding_key(pair.A.name) else shape
    scales: Mapping[str, float] = {}
    notes = []
    if str(read.config.get("peft_type", "LORA")).upper() == "LORA":
        try:
            scales = foreign_scales(read.config, ranks, file=read.config_file)
        except GoraError as err:
            notes.append(f"the scales are not known: {err.what}")
    else:
        notes.append("no plain LoRA: gora-serve convert reads it")
    return {path: Module(ranks[path], scales.get(path), shape) for path, shape in shapes.items()}, notes


def _ranks(modules: Mapping[str, Module]) -> dict[str, Any]:
    """Ranks, and how much of a slot of vLLM the adapter fills: every module is padded to one rank of its own list."""
    if not modules:
        return {"largest_rank": None, "max_lora_rank": None, "slot_fill": None}
    largest = max(module.rank for module in modules.values())
    bucket = bucket_of(largest)
    used = sum(module.rank * sum(module.shape) for module in modules.values())
    slot = sum(sum(module.shape) for module in modules.values()) * (bucket or 0)
    return {"largest_rank": largest, "max_lora_rank": bucket, "slot_fill": used / slot if slot else None}


def _base_of(read: AdapterDir, record: Mapping[str, Any]) -> dict[str, Any]:
    bound, base = bound_roots(record), record.get("base", {})
    return {
        "name": base.get("repo_id") or read.config.get("base_model_name_or_path"),
        "revision": base.get("revision") or read.config.get("revision"),
        "weights_root": bound.weights if bound else None,
        "claim": claim_of(record),
        "trained_on": read.trained_on,
    }


def _run(path: Path) -> Inspected:
    held = is_held(path)
    value = _receipt(path / RUN)
    steps = sorted(int(one.name[5:]) for one in path.glob("checkpoints/step-*") if one.name[5:].isdecimal())
    result, config = _object(value.get("result")), _object(value.get("config"))
    facts = {
        "status": standing(value.get("status"), held=held),
        "method": _object(config.get("train")).get("method"),
        "base": _object(value.get("base")),
        "data": _object(value.get("data")),
        "parameters": result.get("parameters"),
        "gamma": result.get("gamma"),
        "losses": result.get("losses"),
        "seconds": value.get("seconds"),
        "checkpoints": [f"step-{step}" for step in steps],
        "step": steps[-1] if steps else None,
        "steps": _steps(value),
    }
    whole = path / "adapter"
    return Inspected("run", path, facts, adapter=_adapter(whole) if (whole / CONFIG_FILE).is_file() else None)


def _probe(path: Path) -> Inspected:
    value = read_probe(path)
    facts = {
        name: value.get(name) for name in ("mode", "metric", "steps", "samples", "tokens", "loss", "stopped_early")
    }
    facts |= {"base": _object(value.get("base")), "data": _object(_receipt(path / RUN).get("data"))}
    return Inspected("probe", path, {**facts, "targets": len(value["modules"])})


def _steps(value: Mapping[str, Any]) -> int | None:
    """Return how many steps the run takes in all; None where run.json does not say."""
    config = _object(value.get("config"))
    train = _object(config.get("train"))
    plan = TrainConfig(steps=train.get("steps"), epochs=train.get("epochs"), grad_accum=train.get("grad_accum", 1))
    try:
        return int(plan.count_steps(value["data"]["used"], config["data"]["batch_size"], value["processes"])[0])
    except (LookupError, TypeError, ValueError, ArithmeticError):  # of another kind, or not there
        return None


def _model(path: Path) -> Inspected:
    files = find_model(path).weights
    entries = [entry for file in files.values() for entry in read_header(file).entries.values()]
    config = _receipt(path / "config.json")
    facts = {
        "architectures": [str(one) for one in _list(config.get("architectures"))] or None,
        "type": config.get("model_type"),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "files": len(files),
        **_sizes(entries),
        "quantized": config.get("quantization_config") is not None,
    }
    merged = _receipt(path / MERGE)
    if not merged:
        return Inspected("base", path, facts)
    adapters = [one for one in _list(merged.get("adapters")) if isinstance(one, dict)]
    facts |= {
        "base": _object(merged.get("base")),
        "weights_root": merged.get("weights_root"),
        "adapters": [{name: one.get(name) for name in ("adapter", "weight", "family")} for one in adapters],
    }
    return Inspected("merged model", path, facts)


def _sizes(entries: Iterable[TensorEntry]) -> dict[str, Any]:
    found = list(entries)
    return {
        "tensors": len(found),
        "parameters": sum(prod(entry.shape) for entry in found),
        "bytes": sum(entry.nbytes for entry in found),
        "dtypes": dict(sorted(Counter(entry.dtype for entry in found).items())),
    }


def _receipt(file: Path) -> dict[str, Any]:
    return _object(read_json(file, limit=RECEIPT_BYTES)) if file.is_file() else {}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
