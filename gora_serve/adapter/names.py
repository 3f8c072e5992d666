"""Module paths and PEFT's tensor keys: the only file that spells lora_A. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

PREFIX = "base_model.model."
PART = re.compile(r"\.lora_([AB])\.weight$")
CLASSIFIERS = ("score", "classifier")  # PEFT saves modules of these names whole, for a task of classification
EMBEDDING_PART = re.compile(r"\.lora_embedding_([AB])$")


def tensor_key(path: str, part: str) -> str:
    """Return the key of factor `part` ("A" or "B") of a module: base_model.model.<path>.lora_A.weight."""
    return f"{PREFIX}{path}.lora_{part}.weight"


def embedding_key(path: str, part: str) -> str:
    """Return the key of an embedding's factor: base_model.model.<path>.lora_embedding_A, (r, V), or B, (d, r)."""
    return f"{PREFIX}{path}.lora_embedding_{part}"


def saved_key(parameter: str) -> str:
    """Return the key of a parameter that is saved whole (modules_to_save): base_model.model.<parameter path>."""
    return f"{PREFIX}{parameter}"


def holders(parameter: str) -> list[str]:
    """Return the modules that a parameter lies in, from the outermost one."""
    steps = parameter.split(".")[:-1]
    return [".".join(steps[: count + 1]) for count in range(len(steps))]


def saved_as(parameters: Iterable[str]) -> list[str]:
    """Return the modules_to_save that these parameters come from: their own modules, or the classifier that holds
    several of these, as RoBERTa's holds dense and out_proj."""
    classifiers: dict[str, str] = {}
    for parameter in parameters:
        *outer, module = holders(parameter) or [""]
        classifiers[module] = next((one for one in outer if one.rpartition(".")[2] in CLASSIFIERS), "")
    within = Counter(classifiers.values())
    return sorted({one if one and within[one] > 1 else module for module, one in classifiers.items()})


def parse_key(key: str) -> tuple[str, str] | None:
    """Return (module path, "A" or "B"), or None for a tensor that is no LoRA factor. Inverse of tensor_key."""
    return _parse(key, PART.search(key))


def parse_embedding_key(key: str) -> tuple[str, str] | None:
    """Return (module path, "A" or "B") of an embedding's factor, or None. Inverse of embedding_key."""
    return _parse(key, EMBEDDING_PART.search(key))


def _parse(key: str, found: re.Match[str] | None) -> tuple[str, str] | None:
    if not found or not key.startswith(PREFIX) or found.start() <= len(PREFIX):
        return None
    return key[len(PREFIX) : found.start()], found.group(1)


def pattern_key(path: str) -> str:
    """Return the key of rank_pattern and alpha_pattern that matches this path alone.

    PEFT and vLLM read a key as the regular expression `(.*\\.)?(key)$`; so it is anchored and escaped.
    """
    return "^" + re.escape(path)


def kinds_and_layers(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return (kind, layer) of each path, for tables: model.layers.3.mlp.up_proj is ("mlp.up_proj", "3").

    The layer is the first number in the path. What stands before it belongs to the kind only where paths differ
    in it (encoder and decoder). A path without a number is its own kind, on layer "-".
    """
    split = {path: re.fullmatch(r"(.*?)\.?\b(\d+)\.(.*)", path) for path in paths}
    prefixes = {found.group(1) for found in split.values() if found}
    kinds = {}
    for path, found in split.items():
        if found is None:
            kinds[path] = (path, "-")
            continue
        prefix, layer, rest = found.groups()
        kinds[path] = (f"{prefix}.{rest}" if len(prefixes) > 1 and prefix else rest, layer)
    return kinds


def by_kind(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths of each kind, in order of appearance."""
    kinds: dict[str, list[str]] = {}
    for path, (kind, _) in kinds_and_layers(paths).items():
        kinds.setdefault(kind, []).append(path)
    return kinds
