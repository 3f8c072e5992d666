"""What an adapter's weights file says of itself in its metadata: its own root, its base's roots, its origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gora_serve.errors import InputError
from gora_serve.integrity.canonical import parse_json
from gora_serve.integrity.manifest_schema import Roots, root_text

WEIGHTS = "adapter_model.safetensors"
RECORD_SCHEMA = "gora-serve/adapter/1"
TRAINED, ASSERTED = "trained", "asserted"
ROOTS = ("weights_root", "config_root", "tokenizer_root")


def read_record(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Return gora-serve's record out of a weights file's metadata; {} where another tool wrote the file.

    Raises InputError for a record that is malformed or of another schema.
    """
    text = metadata.get("gora_serve")
    if text is None:
        return {}
    record = parse_json(text.encode(), file)
    if not isinstance(record, dict) or record.get("schema") != RECORD_SCHEMA:
        raise InputError(
            "gora_serve metadata has an unknown schema", code="GS-364", file=file, expected=RECORD_SCHEMA,
            actual=record.get("schema") if isinstance(record, dict) else None, hint="upgrade gora-serve",
        )  # fmt: skip
    if not isinstance(record.get("base"), dict) or not isinstance(record.get("origin"), dict):
        raise _malformed(file, "base and origin")
    for name in ROOTS:
        try:
            root_text(record["base"].get(name))
        except TypeError as err:
            raise _malformed(file, f"{name} a root") from err
    return record


def _malformed(file: Path, expected: str) -> InputError:
    return InputError(
        "gora_serve metadata is malformed", code="GS-363", file=file, expected=expected, hint="export the adapter again"
    )


def trained_on(origin: Mapping[str, Any], file: Path) -> dict[str, Any] | None:
    """Return what an adapter's origin says of the base that it was trained on, where that one was quantized.

    The adapter is bound to the base as it is stored, all the same. Raises InputError if the text is no JSON object.
    """
    text = origin.get("trained_on")
    if text is None:
        return None
    value = parse_json(text.encode(), file) if isinstance(text, str) else None
    if not isinstance(value, dict):
        raise _malformed(file, "trained_on an object")
    return value


def trained_on_text(record: Mapping[str, Any]) -> str:
    """Say in half a sentence which quantized base an adapter was trained on, for people."""
    error = record.get("weight_error")
    known = f", mean relative weight error {error:.1%}" if isinstance(error, float) else ""
    return f"trained on the base quantized to {record.get('quantize')}{known}"


def binding_json(
    name: str, revision: str | None, roots: Roots | None, *, asserted: bool = False
) -> dict[str, str | None]:
    """Return what binds an adapter to its base, for the weights file's metadata and for the seal.

    asserted: a person said so (`bind`); where the key is missing, the tool that made the adapter had that base.
    """
    claim: dict[str, str | None] = {"claim": ASSERTED} if asserted else {}
    return {
        "repo_id": name,
        "revision": revision,
        "weights_root": roots.weights if roots else None,
        "config_root": roots.config if roots else None,
        "tokenizer_root": roots.tokenizer if roots else None,
    } | claim


def claim_of(record: Mapping[str, Any]) -> str | None:
    """Return how the adapter is bound: "trained" (by the tool that made it), "asserted" (by a person), None: it
    is not."""
    if bound_roots(record) is None:
        return None
    return ASSERTED if record["base"].get("claim") == ASSERTED else TRAINED


def bound_roots(record: Mapping[str, Any]) -> Roots | None:
    """Return the roots of the base that the record binds its adapter to, if it binds it."""
    base = record.get("base", {})
    weights = base.get("weights_root")
    return Roots(weights, base.get("config_root"), base.get("tokenizer_root")) if weights else None
