"""Keys of a configuration that make libraries run code that came with the model. Such a base is refused.

gora-serve itself never asks for that code. But transformers before 5.3 ran what `_attn_implementation_internal` names
without being asked (CVE-2026-4372), and engines have followed `auto_map` (CVE-2025-66448).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gora_serve.errors import InputError
from gora_serve.integrity.canonical import read_json

KEYS = ("auto_map", "_attn_implementation_internal", "_experts_implementation_internal")

TRUST = (
    "where transformers has the model itself, delete the key in a copy of the base; "
    "where you trust the code, serve with: -- --trust-remote-code"
)


def refuse_remote_code(folder: Path) -> None:
    """Raise InputError (GS-338), naming file and key, where the base's config.json asks for code."""
    file = folder / "config.json"
    found = next(_asking(read_json(file), ""), None) if file.is_file() else None
    if found is not None:
        key, value = found
        raise InputError(
            "the base's configuration asks for code to be run", code="GS-338", file=file,
            expected=f"no {key.rpartition('.')[2]}", actual=f"{key} = {str(value)[:80]}", hint=TRUST,
        )  # fmt: skip


def _asking(value: object, place: str) -> Iterator[tuple[str, object]]:
    """Yield each key that asks for code and its value, at any depth: a text_config has one of its own."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in KEYS and inner:
                yield f"{place}{key}", inner
            yield from _asking(inner, f"{place}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _asking(inner, place)
