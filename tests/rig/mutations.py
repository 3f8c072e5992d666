"""Structure-aware damage for the readers of the integrity room, and what each reader must then do: accept, or raise a
GoraError, within a second. Where the safetensors library rejects a file, so must we.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.adapter.peft_config import foreign_scales, read_scales, saved_modules
from gora_serve.errors import GoraError
from gora_serve.integrity.binding import check_folder, with_digest
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.files import json_text
from gora_serve.integrity.headers import encode_header, read_header
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.manifest import Manifest, hash_model, tensors_from_json, weights_root
from gora_serve.integrity.record import bound_roots, read_record, trained_on
from gora_serve.integrity.roots import config_root
from gora_serve.serving.adapter_dir import WEIGHTS_FILE, read_adapter_dir
from gora_serve.serving.preflight import check_adapter, refuse

HANG = 1.0  # seconds
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, -0.0, 1.5, 1e308, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**40, "", "x", "..",
    "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "é", "e\u0301", "\U0001f600", "x" * 600, "F32", "F7", "(a+)+$",
    [], [0], [2, 2], [-1], [2**62, 4], [0, 2**60], [[]], {}, {"a": 1},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
)  # fmt: skip
NAMES = ("a", "b", "A", "a.lora_A.weight", "__metadata__", "", "é", "e\u0301", "x\n", "y" * 513, "gora_serve", "format")


@dataclass(frozen=True)
class Target:
    """One reader: a valid input, how its bytes are made from a value, and the reader itself."""

    name: str
    value: Callable[[random.Random], Any]
    encode: Callable[[Any, random.Random], bytes]
    read: Callable[[Path], object]
    file: str
    rejected_by_library: bool = False  # compare with safetensors


@dataclass(frozen=True)
class Verdict:
    """What one input did: accepted, refused, crashed, hung, or accepted though the library rejects it."""

    what: str
    detail: str = ""


def header_value(chance: random.Random) -> Any:
    """A valid header with up to four tensors; the length of its data follows from it."""
    position, members = 0, {}
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "BOOL": 1, "F64": 8, "F8_E4M3": 1}
    for name in chance.sample(("a", "b", "lora_A.weight", "model.x", "é"), chance.randrange(5)):
        dtype = chance.choice(list(sizes))
        shape = [chance.randrange(4) for _ in range(chance.randrange(3))]
        count = 1
        for size in shape:
            count *= size
        end = position + count * sizes[dtype]
        members[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if chance.random() < 0.5:
        members["__metadata__"] = {"format": "pt"}
    return members


def header_bytes(value: Any, chance: random.Random) -> bytes:
    text = json_bytes(value, chance) + b" " * chance.choice((0, 0, 1, 7))
    ends = [item["data_offsets"][1] for item in value.values() if _has_end(item)] if isinstance(value, dict) else []
    size = max([end for end in ends if 0 <= end < 4096], default=0)
    length = len(text) + chance.choice((0,) * 30 + (1, -1, 8, 2**32, 2**63 - len(text) - 1))
    return max(length, 0).to_bytes(8, "little") + text + b"\1" * max(0, size + chance.choice((0,) * 15 + (1, -1, 8)))


def _has_end(item: Any) -> bool:
    offsets = item.get("data_offsets") if isinstance(item, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int)


def json_bytes(value: Any, chance: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.05 and '": ' in text:  # a key twice
        at = text.index('": ')
        text = text[:-1] + f', {text[1:at]}": 1' + "}" if text.startswith("{") else text
    if chance.random() < 0.03:
        depth = chance.choice((60, 70, 2000, 100_000))
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}" if text.startswith("{") else "[" * depth
    if chance.random() < 0.03:
        text = text.replace("1", chance.choice(("NaN", "Infinity", "1e999", "-0", "01", "1" * 5000, "0x1")), 1)
    return text.encode("utf-8", "surrogatepass")


def damaged(value: Any, chance: random.Random) -> Any:
    """The value with none to a few of its parts replaced, removed, renamed or added."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        value = _one_change(value, chance)
    return value


def _one_change(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        result = dict(value)
        way = chance.random()
        if way < 0.65:
            result[key] = _one_change(value[key], chance)
        elif way < 0.75:
            del result[key]
        elif way < 0.9:
            result[chance.choice(NAMES)] = result.pop(key)
        else:
            result[chance.choice(NAMES)] = value[key]
        return result
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], _one_change(value[at], chance), *value[at + 1 :]]
    if isinstance(value, int) and chance.random() < 0.5:
        return value + chance.choice((-1, 1, 4, 2**31, 2**53))
    return chance.choice(ODD)


def torn(data: bytes, chance: random.Random) -> bytes:
    """The bytes, now and then with a few of them changed, cut or repeated."""
    if not data or chance.random() < 0.8:
        return data
    at = chance.randrange(len(data))
    way = chance.randrange(4)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if way == 2:
        return data[:at] + bytes(chance.randrange(256) for _ in range(3)) + data[at:]
    return data[:at] + data[at : at + 8] * 2 + data[at + 8 :]


DIGEST = "0" * 64
SEALED = {
    "schema": "gora-serve/output-manifest/1",
    "files": {"f": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
    "status": "complete",
}
RECORD = {
    "schema": "gora-serve/adapter/1", "adapter_root": f"gb1:sha256:{DIGEST}",
    "base": {"repo_id": "x", "revision": None, "weights_root": f"gb1:sha256:{DIGEST}", "config_root": None,
             "tokenizer_root": None},
    "origin": {"method": "gora", "trained_on": '{"quantize": "nf4"}'},
}  # fmt: skip
PEFT = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"model.layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"model.layers.0.self_attn.v_proj": 8},
    "use_rslora": False, "use_dora": False,
    "bias": "none", "modules_to_save": None, "fan_in_fan_out": False, "layers_to_transform": None,
    "base_model_name_or_path": "x",
}  # fmt: skip
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "rope_theta": 10000.0, "tie_word_embeddings": True,
          "rope_scaling": {"type": "linear", "factor": 2.0}}  # fmt: skip
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
RANKS = {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 8}


def _read_record(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "replace")
    record = read_record({"gora_serve": text}, path)
    return record and (bound_roots(record), trained_on(record.get("origin", {}), path))


def _read_index(path: Path) -> object:
    return find_model(path.parent)


def _read_manifest(path: Path) -> object:
    return Manifest.from_json(read_json(path), file=path)


def _read_peft(path: Path) -> object:
    """All that reads it without torch: as our own export, as another tool's adapter, and as `serve` looks at it."""
    refused = []
    for read in (read_scales, foreign_scales, lambda config, _, *, file: saved_modules(config, file=file), _preflight):
        config = read_json(path)
        if not isinstance(config, dict):
            return None  # its callers refuse that before
        try:
            read(config, RANKS, file=path)
        except GoraError as err:
            refused.append(err)
    if refused:
        raise refused[0]
    return None


def sealed_bytes(value: Any, chance: random.Random) -> bytes:
    """A seal that states its own digest, so that damage of the value reaches what reads it; else as `json_bytes`."""
    try:
        return json_text(with_digest(value)).encode()
    except (AttributeError, TypeError, ValueError):
        return json_bytes(value, chance)


def _preflight(_config: Mapping[str, Any], _ranks: Mapping[str, int], *, file: Path) -> None:
    refuse(check_adapter(read_adapter_dir("x", file.parent)))


def targets(manifest: Mapping[str, Any]) -> list[Target]:
    """All readers. `manifest`: a valid one, as `Manifest.to_json` gives it."""

    def of(name: str, valid: Any, read: Callable[[Path], object], file: str) -> Target:
        return Target(name, lambda _: valid, json_bytes, read, file)

    return [
        Target("safetensors header", header_value, header_bytes, read_header, "model.safetensors", True),
        of("index.json", INDEX, _read_index, "model.safetensors.index.json"),
        of("adapter_config.json", PEFT, _read_peft, "adapter_config.json"),
        of("config.json", CONFIG, lambda path: config_root(path.parent), "config.json"),
        Target("seal", lambda _: SEALED, sealed_bytes, lambda path: check_folder(path.parent), "gora_manifest.json"),
        of("record", RECORD, _read_record, "record"),
        of("base manifest", manifest, _read_manifest, "gora-base.json"),
    ]


def prepare(target: Target, folder: Path) -> Path:
    """Make the folder that the reader of this target needs around its file; return the file's path."""
    place = folder / target.name.replace(" ", "-")
    place.mkdir()
    if target.name == "seal":
        (place / "f").write_text("x")
    if target.name == "adapter_config.json":
        layout = [(f"base_model.model.{module}.lora_{side}.weight", "F32", shape) for module, rank in RANKS.items()
                  for side, shape in (("A", (rank, 1)), ("B", (1, rank)))]  # fmt: skip
        size = 4 * sum(a * b for _, _, (a, b) in layout)
        (place / WEIGHTS_FILE).write_bytes(encode_header(layout, {}) + bytes(size))
    if target.name == "index.json":
        for name in INDEX["weight_map"].values():
            (place / name).write_bytes(b"")
    return place / target.file


def input_of(target: Target, chance: random.Random) -> bytes:
    return torn(target.encode(damaged(target.value(chance), chance), chance), chance)


def judge(target: Target, path: Path, data: bytes) -> Verdict:
    verdict = _judge_once(target, path, data)
    return _judge_once(target, path, data) if verdict.what == "hung" else verdict  # the machine may have been busy


def _judge_once(target: Target, path: Path, data: bytes) -> Verdict:
    path.write_bytes(data)
    began = time.perf_counter()
    try:
        target.read(path)
        what, detail = "accepted", ""
    except GoraError as err:
        what, detail = "refused", err.code
    except Exception as err:
        return Verdict("crashed", f"{type(err).__name__}: {err}")
    seconds = time.perf_counter() - began
    if seconds > HANG:
        return Verdict("hung", f"{seconds:.1f} s")
    if target.rejected_by_library and what == "accepted" and (why := library_rejects(path)):
        return Verdict("accepted against the library", why)
    return Verdict(what, detail)


def library_rejects(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = set(file.keys())
    except SafetensorError as err:
        return str(err)
    return None if names == set(read_header(path).entries) else f"other names: {names}"


def make_manifest(base: Path) -> dict[str, Any]:
    made = hash_model(base).to_json()
    tensors = dict(list(made["tensors"].items())[:3])  # type: ignore[attr-defined]
    return {**made, "tensors": tensors, "weights_root": weights_root(tensors_from_json(tensors))}
