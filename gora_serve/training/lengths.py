"""Whether rows of a length fit a model's positions: asked of the settings alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gora_serve.config import DataConfig
from gora_serve.errors import UsageError

NAMES = ("max_position_embeddings", "n_positions")  # what model types call it


def positions(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model has, by its config.json; None where it does not say."""
    text = config.get("text_config") or config
    found = [text.get(name) for name in NAMES] if isinstance(text, Mapping) else []
    return next((one for one in found if isinstance(one, int) and not isinstance(one, bool)), None)


def check_length(limit: int | None, rows: DataConfig) -> None:
    """Refuse rows that may be longer than a model has positions. Raises UsageError (GS-205)."""
    if limit is not None and rows.max_length > limit:
        raise UsageError(
            "--max-length is more than the base has positions", code="GS-205", expected=f"at most {limit}",
            actual=rows.max_length, hint="lower --max-length; longer rows are left out or cut",
        )  # fmt: skip
