"""Adapters and bases for the serving tests: header-sized ones by default, SmolLM2 for the end-to-end tier."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

WriteAdapter = Callable[..., Path]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that says it is a Llama; nothing in it can be loaded."""
    folder = tmp_path / "tiny-base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """Write an adapter: ranks by module, `config` changes keys, `tensors` adds to the file (None removes)."""

    def write(
        name: str,
        ranks: Mapping[str, int],
        *,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        content: dict[str, Any] = {
            "peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": 16, "bias": "none",
            "target_modules": sorted(ranks), "rank_pattern": {"^" + m.replace(".", r"\."): r for m, r in ranks.items()},
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(content | dict(config or {})))
        arrays: dict[str, Any] = {}
        for module, rank in ranks.items():
            arrays[f"base_model.model.{module}.lora_A.weight"] = np.zeros((rank, 12), np.float32)  # (r, in)
            arrays[f"base_model.model.{module}.lora_B.weight"] = np.zeros((6, rank), np.float32)  # (out, r)
        arrays |= dict(tensors or {})
        kept = {key: array for key, array in arrays.items() if array is not None}
        save_file(kept, folder / "adapter_model.safetensors")
        return folder

    return write
