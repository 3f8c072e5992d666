"""In what the base of an adapter lay while it was trained, by what the adapter says of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.named_base import short_name
from gora_serve.integrity.record import read_record, trained_on

MIRROR = re.compile(r"(?i)([-_]unsloth)?[-_](bnb[-_]4bit|nf4)$")  # as mirrors of such bases on the hub are called


def quantization(metadata: Mapping[str, str], base_name: str, file: Path) -> tuple[str, str] | None:
    """Return ("nf4", how one knows) or None. metadata: of the adapter's weights file; base_name: as it names its base.

    Raises InputError for a record of ours that is malformed.
    """
    record = read_record(metadata, file)
    found = trained_on(record["origin"], file) if record else None
    if found is not None and found.get("quantize") == "nf4":
        return "nf4", "the adapter's own record says so"
    if MIRROR.search(_called(base_name)):
        return "nf4", f"the adapter names the base {base_name}"
    return None


def unquantized_name(name: str) -> str:
    """Return what a base is called before it was quantized, by the name of a mirror of it in 4 bits; another name as it
    is. A folder that holds a quantized model becomes a name, since its weights are none to be compared."""
    folder = Path(name)
    if os.path.isfile(folder / "config.json"):  # noqa: PTH113 - no error for a name that no disk can hold
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or not config.get("quantization_config"):
            return name
        return MIRROR.sub("", short_name(str(folder.resolve())))
    return MIRROR.sub("", _called(name)) if MIRROR.search(_called(name)) else name


def _called(name: str) -> str:
    """Return the name of a snapshot in the hub's cache, and others as they are."""
    return short_name(name) if Path(name).parent.name == "snapshots" else name.rstrip("/")
