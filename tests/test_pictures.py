"""Pictures: they fill their paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from gora_serve.gora.ranks import RankPlan
from gora_serve.pictures import plot_ranks


def test_no_wide_margin_beside_the_colour_bar(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image, ImageOps

    ranks = {f"model.layers.{layer}.mlp.{kind}_proj": 4 + layer for layer in range(40) for kind in ("up", "down")}
    plot_ranks(RankPlan("paper", 8, 4, 43, ranks, dict.fromkeys(ranks, (64, 64))), tmp_path / "ranks.png")
    with Image.open(tmp_path / "ranks.png") as image:
        left, _, right, _ = ImageOps.invert(image.convert("L")).getbbox() or (0, 0, 0, 0)
        assert left < 0.02 * image.width
        assert right > 0.98 * image.width
