"""In which type vLLM computes: `--dtype auto` is not always that of the base's files."""

from __future__ import annotations

import json
from pathlib import Path

SPELLINGS = {"half": "float16", "float": "float32"}
NEVER_HALF = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})  # vLLM 0.32, config/model.py: too small a range


def served_dtype(asked: str, stored: str | None, kind: str | None) -> str:
    """Return the name of the type that vLLM 0.32 serves weights, activations and adapters in.

    asked: `--dtype`. stored: the base's. kind: its model_type. "auto" makes bfloat16 of float32 and of what it does not
    know, and of float16 where this architecture's activations do not fit into it. Devices without bfloat16 get float16
    there, which is no wider and no less exact.
    """
    if asked != "auto":
        return SPELLINGS.get(asked, asked)
    return "float16" if stored == "float16" and kind not in NEVER_HALF else "bfloat16"


def dtype_served(asked: str, base: Path) -> str:
    """`served_dtype` of the base in a folder, as its config.json says it."""
    config = json.loads((base / "config.json").read_bytes())
    inner = config.get("text_config") or {}
    stored = (part.get(name) for part in (config, inner) for name in ("dtype", "torch_dtype"))
    return served_dtype(asked, next(filter(None, stored), None), config.get("model_type"))
