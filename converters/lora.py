"""Plain LoRA as PEFT saves it: A and B per module, scale alpha / r or alpha / √r, with rank and alpha patterns.

EVA, LoRA+, LoRA-FA, MiCA and VeLoRA are this on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.experts import Wrapped, read_parameters
from converters.pairs import Pair, factors_of, pairs_of
from converters.reading import Inputs, Reading
from converters.source import Source
from converters.token_rows import row_factors, rows_of
from converters.whole import Whole, sort_whole
from gora_serve.adapter.engine_ranks import LARGEST_RANK
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.errors import InputError
from gora_serve.integrity.record import read_record, trained_on


def read(source: Source, inputs: Inputs) -> Reading:
    """Read plain LoRA. The update is what PEFT and vLLM apply: served and adapter are one, where an engine takes it."""
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
    embeddings |= {path for path in rows if not inputs.need_base("lora").is_head(path)}
    adapter = Adapter(
        modules,
        base_id(source),
        carried=whole.tensors(source),
        origin=_lay_in(source),
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
        served=modules if _is_served(source, pairs, wrapped, whole) and not rows else None,
        method="scale * B A",
        notes=(*whole.notes, *wrapped.notes),
    )


def _is_served(source: Source, pairs: Mapping[str, Pair], wrapped: Wrapped, whole: Whole) -> bool:
    """Tell whether an engine takes the file as it is."""
    largest = max((source.tensors.shape(pair.A)[0] for pair in pairs.values()), default=0)
    return not wrapped.fused and whole.is_served and largest <= LARGEST_RANK


def modules_of(source: Source, inputs: Inputs) -> LazyModules:
    """Return the factors alone, as stored: what `read` has, less trainable tokens."""
    pairs = pairs_of(source)
    return _beside(read_parameters(source, pairs, inputs), source, pairs)


def _beside(wrapped: Wrapped, source: Source, pairs: Mapping[str, Pair]) -> LazyModules:
    return wrapped.beside(factors_of(source, {path: pairs[path] for path in pairs if path not in wrapped.taken}))


def _lay_in(source: Source) -> dict[str, str]:
    """Return what our own record says of a base that was quantized in training, as an origin."""
    origin = read_record(source.tensors.metadata, source.weights).get("origin", {})
    return {"trained_on": origin["trained_on"]} if trained_on(origin, source.weights) else {}


def base_id(source: Source) -> BaseId:
    """Return the base that the configuration names, whoever that is; not hashed."""
    return BaseId(str(source.config.get("base_model_name_or_path") or ""), source.config.get("revision"))
