"""Plain LoRA as PEFT saves it: A and B per module, scale alpha / r or alpha / √r, with rank and alpha patterns.

EVA, LoRA+, LoRA-FA, MiCA and VeLoRA are this on disk. The families that edit the base build on `factors_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from converters.checks import check_numbers, check_pair
from converters.experts import Wrapped, read_parameters
from converters.reading import Inputs, Reading
from converters.source import Source
from converters.token_rows import row_factors, rows_of
from converters.whole import sort_whole
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.names import parse_embedding_key, parse_key
from gora_serve.adapter.peft_config import foreign_scales
from gora_serve.errors import InputError


@dataclass(frozen=True)
class Pair:
    """The tensor names of a module's factors. Of an embedding (V, d) PEFT has A (r, V) and B (d, r)."""

    A: str
    B: str
    embedding: bool = False


def read(source: Source, inputs: Inputs) -> Reading:
    """Read plain LoRA. The update is what PEFT and vLLM apply: served and adapter are one, but for fused experts."""
    pairs, rows = pairs_of(source), rows_of(source, inputs)
    if not pairs and not rows:
        raise InputError(
            "no tensor of this family", code="GS-3151", file=source.weights, tensor=next(iter(source.tensors), None),
            expected="names such as base_model.model.MODULE.lora_A.weight",
            hint="save it by PEFT's save_pretrained; if --from was given, leave it out: the family is found by itself",
        )  # fmt: skip
    wrapped = read_parameters(source, pairs, inputs)
    low_rank = _beside(wrapped, source, pairs)

    def factors(path: str) -> LoraFactors:
        return row_factors(source, inputs.need_base("lora"), path, rows[path]) if path in rows else low_rank[path]

    both = sorted(rows.keys() & set(low_rank))
    if both:
        raise InputError(
            "a module has trained tokens and LoRA factors, which are not read together", code="GS-3127",
            file=source.weights, tensor=both[0], hint="merge it with PEFT, and convert the merged model: --from full",
        )  # fmt: skip
    modules = LazyModules([*low_rank, *rows], factors)
    whole = sort_whole(source, inputs, modules)
    embeddings = frozenset(path for path, pair in pairs.items() if pair.embedding)
    embeddings |= {path for path in rows if inputs.need_base("lora").is_embedding(path)}
    adapter = Adapter(
        modules,
        base_id(source),
        carried=whole.tensors(source),
        task_type=source.config.get("task_type"),
        embeddings=embeddings,
    )
    applied = {name for pair in pairs.values() for name in (pair.A, pair.B)} | {one.tensor for one in rows.values()}
    return Reading(
        adapter,
        frozenset(applied),
        frozenset(whole.carried.values()),
        whole.known,
        lost=whole.lost,
        beyond=replace(whole.beyond(lambda path: low_rank[path].scale), stacks=wrapped.stacks),
        served=None if wrapped.fused else modules,
        method="scale * B A",
        notes=(*whole.notes, *wrapped.notes),
    )


def modules_of(source: Source, inputs: Inputs) -> LazyModules:
    """Return the factors alone, as stored: what `read` has, less trainable tokens."""
    pairs = pairs_of(source)
    return _beside(read_parameters(source, pairs, inputs), source, pairs)


def _beside(wrapped: Wrapped, source: Source, pairs: Mapping[str, Pair]) -> LazyModules:
    return wrapped.beside(factors_of(source, {path: pairs[path] for path in pairs if path not in wrapped.taken}))


def base_id(source: Source) -> BaseId:
    """Return the base that the configuration names, whoever that is; not hashed."""
    return BaseId(str(source.config.get("base_model_name_or_path") or ""), source.config.get("revision"))


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
