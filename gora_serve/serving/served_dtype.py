"""In which type vLLM computes: `--dtype auto` is not always that of the base's files."""

from __future__ import annotations

import json
from pathlib import Path

from gora_serve.integrity.headers import read_header
from gora_serve.integrity.layout import find_model
from gora_serve.serving.preflight import FLOATS

SPELLINGS = {"half": "float16", "float": "float32"}
NEVER_HALF = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})  # vLLM 0.32, config/model.py: too small a range


def served_dtype(asked: str, stored: str | None, kind: str | None) -> str:
    """Return the name of the type that vLLM 0.32 serves weights, activations and adapters in.

    asked: `--dtype`. stored: the base's. kind: its model_type. "auto" makes bfloat16 of float32 and of what it does not
    know, and of float16 where this architecture's activations do not fit into it. Devices without bfloat16 get float16
    there: as many bytes, and more exact.
    """
    if asked != "auto":
        return SPELLINGS.get(asked, asked)
    return "float16" if stored == "float16" and kind not in NEVER_HALF else "bfloat16"


def dtype_served(asked: str, base: Path) -> str:
    """`served_dtype` of the base in a folder."""
    config = json.loads((base / "config.json").read_bytes())
    inner = config.get("text_config") or {}
    said = (part.get(name) for part in (config, inner) for name in ("dtype", "torch_dtype"))
    stored = next(filter(None, said), None) or (_type_in_files(base) if asked == "auto" else None)
    return served_dtype(asked, stored, config.get("model_type"))


def _type_in_files(base: Path) -> str | None:
    """Return "float16" where all of the weights' files have it, as vLLM asks them where config.json says nothing."""
    files = set(find_model(base).weights.values())
    types = {entry.dtype for file in files for entry in read_header(file).entries.values()}
    return "float16" if types & FLOATS == {"F16"} else None
