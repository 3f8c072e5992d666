"""The factors of plain LoRA in a file, as PEFT names and scales them. The families that edit the base build on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.checks import check_numbers, check_pair
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.names import parse_embedding_key, parse_key
from gora_serve.adapter.peft_config import foreign_scales
from gora_serve.errors import InputError


@dataclass(frozen=True)
class Pair:
    """The tensor names of a module's factors. Of an embedding (V, d) PEFT has A (r, V) and B (d, r)."""

    A: str
    B: str
    embedding: bool = False


def pairs_of(source: Source) -> dict[str, Pair]:
    """Return the factors' names by module path. Raises InputError for a factor without its twin (GS-3108)."""
    parts: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    for name in source.tensors:
        embedding = parse_embedding_key(plain := name.replace(".default", ""))
        parsed = embedding or parse_key(plain)
        if parsed:
            parts.setdefault(parsed[0], {})[parsed[1]] = name
            embeddings |= {parsed[0]} if embedding else set()
    for found in parts.values():
        if found.keys() != {"A", "B"}:
            raise InputError(
                "a LoRA factor lacks its twin", code="GS-3108", file=source.weights, tensor=next(iter(found.values())),
                hint="fetch the adapter again; the file is not whole",
            )  # fmt: skip
    check_numbers(source, (name for found in parts.values() for name in found.values()))
    return {path: Pair(found["A"], found["B"], path in embeddings) for path, found in parts.items()}


def factors_of(source: Source, pairs: Mapping[str, Pair]) -> LazyModules:
    """Return the factors as stored, with PEFT's scale.

    Raises InputError for ranks that the configuration denies, and for factors that do not fit (GS-3207).
    """
    for pair in pairs.values():
        check_pair(source, pair.A, pair.B)
    ranks = {path: source.tensors.shape(pair.A)[0] for path, pair in pairs.items()}
    scales = foreign_scales(source.config, ranks, file=source.config_file)

    def factors(path: str) -> LoraFactors:
        pair = pairs[path]
        A, B = source.tensors[pair.A], source.tensors[pair.B]
        return LoraFactors(B.T, A.T, scales[path]) if pair.embedding else LoraFactors(A, B, scales[path])

    return LazyModules(pairs, factors)
