"""What verify says of merges by others: right ones pass, whatever the type; wrong ones are named, however small.

The right ones are PEFT's; the wrong ones are right ones that were spoiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from proving import merged
from test_merging import ALL, judge, make, spoiled
from tiny_models import build_llama
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about embeddings, tied heads and fan_in_fan_out
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def merge(folder: Path, **settings: Any) -> Path:
    """Merge; without the manifest, which would tell by itself what is spoiled."""
    merged(folder / "adapter", folder / "base", folder / "out", **settings)
    (folder / "out" / "gora_manifest.json").unlink()
    return folder / "out"


def noise(shape: torch.Size, size: float) -> Tensor:
    """Numbers of this size, of either sign."""
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(5)).sign()


def test_float16_is_held_to_its_own_steps(tmp_path: Path) -> None:
    """Which reach far below its smallest normal number, 6e-5."""
    make(tmp_path, lambda: build_llama().half(), target_modules=["q_proj"])
    merge(tmp_path)
    names = (Q_PROJ, "model.layers.0.mlp.up_proj.weight")
    for name in names:
        spoiled(tmp_path / "out", name, lambda t: (t.float() + noise(t.shape, 5.5e-5)).half())
    assert {one.name for one in judge(tmp_path, tmp_path / "out").of("differs")} == set(names)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_taken_whole_is_the_same_to_the_bit(tmp_path: Path, name: str) -> None:
    """A head and a norm of the adapter's, and embeddings that are the base's, rounded to another type."""
    make(tmp_path, build_llama, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    merge(tmp_path, dtype="bfloat16")
    assert judge(tmp_path, tmp_path / "out").verdict == "exact"
    spoiled(tmp_path / "out", name, lambda t: (t.view(torch.int16) + 1).view(torch.bfloat16))
    assert [one.name for one in judge(tmp_path, tmp_path / "out").of("differs")] == [name]
