"""The model card that an exported adapter carries: what it is made of, and how to use it. Text only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import gora_serve
from gora_serve.adapter.engine_ranks import padded_rank
from gora_serve.adapter.factors import Adapter, BaseId
from gora_serve.adapter.names import by_kind
from gora_serve.config import Form
from gora_serve.integrity.hub import is_hub_id
from gora_serve.integrity.record import trained_on, trained_on_text

USE = {
    "unit": "scale 1 in PEFT and in every vLLM that loads it",
    "padded": "one rank, no patterns: right in every engine that reads PEFT LoRA",
    "native": "PEFT's own form with rank patterns, for PEFT and vLLM 0.32 or later",
}


def model_card(adapter: Adapter, form: Form) -> str:
    """Return README.md: base, ranks, parameters, data digest, settings. The same adapter gives the same text."""
    roots = adapter.base.roots
    origin = adapter.origin
    made = {"converted_from", "merged_from"} & origin.keys()  # from others, and not trained
    lines = [
        *_front_matter(adapter),
        f"# {_title(origin)}",
        "",
        "A low-rank adapter for an unmodified base model, made by gora-serve.",
        "",
        *_trained_on(adapter),
        *_table(
            [
                ("Base", adapter.base.name + (f" at {adapter.base.revision}" if adapter.base.revision else "")),
                ("Base weights root", f"`{roots.weights}`" if roots else "not bound"),
                ("Modules", str(len(adapter.modules))),
                ("Parameters" if made else "Trainable parameters", f"{_trained(adapter):,}"),
                ("Ranks", _rank_text(adapter, form)),
                ("Form", f"{form} ({USE[form]})"),
                *_history(origin),
                ("Made by", origin.get("tool", f"gora-serve {gora_serve.__version__}")),
            ]
        ),
        "",
        *_settings(origin),
        "## Ranks by kind of module",
        "",
        "| module | number | least | mean | most |",
        "| --- | --- | --- | --- | --- |",
        *_rank_rows(adapter),
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "this folder")',
        "```",
        "",
        "`gora-serve verify FOLDER --base BASE` proves that the files are whole and belong to the base.",
    ]
    return "\n".join(lines) + "\n"


def _title(origin: Mapping[str, str]) -> str:
    for key, title in (("converted_from", "LoRA adapter, converted"), ("merged_from", "LoRA adapter, merged")):
        if key in origin:
            return title
    return f"{origin.get('method', 'LoRA').upper().replace('GORA', 'GoRA').replace('LORA', 'LoRA')} adapter"


def _history(origin: Mapping[str, str]) -> list[tuple[str, str]]:
    """Where the update comes from: training data, or the family or the adapters that it was made from, and how."""
    if "converted_from" in origin:
        return [("Converted from", origin["converted_from"]), ("How", origin.get("converted_by", "unknown"))]
    if "merged_from" in origin:
        parts = ", ".join(f"`{part['adapter']}` * {part['weight']:g}" for part in json.loads(origin["merged_from"]))
        return [("Merged from", parts), ("How", origin.get("merged_by", "unknown"))]
    return [("Training data", f"{origin.get('data', 'unknown')}, SHA-256 `{origin.get('data_sha256', 'unknown')}`")]


def _settings(origin: Mapping[str, str]) -> list[str]:
    settings = json.loads(origin.get("settings", "{}"))
    return (
        ["## Settings", "", *_table([(key, f"`{value}`") for key, value in settings.items()]), ""] if settings else []
    )


def _trained_on(adapter: Adapter) -> list[str]:
    """A sentence for an adapter that saw another base in training than the one it is bound to."""
    record = trained_on(adapter.origin, Path("README.md"))
    if record is None:
        return []
    made = f"bitsandbytes {record.get('bitsandbytes')}, blocks of {record.get('blocksize')}"
    computed = f"computed in {record.get('compute_dtype')}, memory root `{record.get('memory_root')}`"
    text = f"It was {trained_on_text(record)} ({made}, {computed})."
    return [f"{text} The base that it is bound to is that one as it is stored, not quantized.", ""]


def _front_matter(adapter: Adapter) -> list[str]:
    tags = ["lora", "gora-serve", *({adapter.origin["method"]} - {"lora"} if "method" in adapter.origin else ())]
    base = [f"base_model: {json.dumps(adapter.base.name)}"] if _on_hub(adapter.base) else []  # the hub takes no path
    return [
        "---",
        *base,
        "library_name: peft",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]


def _on_hub(base: BaseId) -> bool:
    return base.revision is not None or ("/" in base.name and is_hub_id(base.name))


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    escaped = ((key, value.replace("|", "\\|")) for key, value in rows)
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in escaped)]


def _trained(adapter: Adapter) -> int:
    return int(adapter.origin.get("parameters", adapter.parameters))


def _rank_text(adapter: Adapter, form: Form) -> str:
    ranks = sorted(adapter.ranks.values())
    low, high = ranks[0], ranks[-1]
    told = str(low) if low == high else f"{low} to {high}, mean {sum(ranks) / len(ranks):.2f}"
    return told + (f"; in the file padded with zeros to {padded_rank(high)}" if form == "padded" else "")


def _rank_rows(adapter: Adapter) -> list[str]:
    kinds = {kind: [adapter.modules[path].rank for path in paths] for kind, paths in by_kind(adapter.modules).items()}
    return [
        f"| {kind} | {len(ranks)} | {min(ranks)} | {sum(ranks) / len(ranks):.2f} | {max(ranks)} |"
        for kind, ranks in sorted(kinds.items())
    ]
