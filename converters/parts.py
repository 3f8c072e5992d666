"""The tensors of an adapter sorted by module, and what lies beside them: the ground that PEFT's other families share.

What a tensor means is the family's business. A name is `base_model.model.<module path>.<part>`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from converters.checks import check_numbers
from converters.lora import base_id
from converters.reading import Inputs, Reading
from converters.source import Source
from converters.whole import sort_whole
from gora_serve.adapter.factors import Adapter, LazyModules
from gora_serve.adapter.names import PREFIX
from gora_serve.errors import InputError

Parts = Mapping[str, str]  # part -> tensor name, of one module


def parts_of(source: Source, known: Collection[str], needed: Iterable[Collection[str]]) -> dict[str, Parts]:
    """Return the tensors of each module: module path -> part -> tensor name, for the parts of `known`.

    needed: the sets of parts that make a whole module. Raises InputError: GS-3150 for a module that lacks a part,
    GS-3151 where the file holds none at all, GS-3140 for odd numbers.
    """
    found: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        path, _, part = name.removesuffix(".default").rpartition(".")
        if part in known and path.startswith(PREFIX):
            found.setdefault(path.removeprefix(PREFIX), {})[part] = name
    wholes = [frozenset(whole) for whole in needed]
    for path, parts in found.items():
        if parts.keys() not in wholes:
            raise InputError(
                "a module of the adapter is not whole", code="GS-3150", file=source.weights, tensor=path,
                expected=" or ".join(", ".join(sorted(whole)) for whole in wholes), actual=", ".join(sorted(parts)),
                hint="the file is damaged, or of a kind that has no plain matrix (a convolution): merge it instead",
            )  # fmt: skip
    check_numbers(source, (name for parts in found.values() for name in parts.values()))
    if not found:
        raise InputError(
            "no tensor of this family", code="GS-3151", file=source.weights, expected=", ".join(sorted(known)),
            hint="leave out --from, and the family is found by itself",
        )  # fmt: skip
    return dict(found)


def reading_of(
    source: Source,
    inputs: Inputs,
    modules: LazyModules,
    parts: Mapping[str, Parts],
    *,
    method: str,
    shared: Iterable[str] = (),
    full_rank: bool = False,
    notes: tuple[str, ...] = (),
) -> Reading:
    """Return the reading of a family that leaves the base alone: each part applied, modules_to_save carried.

    shared: tensors that serve several modules. No engine serves such a checkpoint as it is.
    """
    whole = sort_whole(source, inputs, parts)
    carried = whole.tensors(source)
    adapter = Adapter(modules, base_id(source), carried=carried, task_type=source.config.get("task_type"))
    return Reading(
        adapter,
        frozenset(name for one in parts.values() for name in one.values()) | frozenset(shared),
        frozenset(whole.carried.values()),
        whole.known,
        lost=whole.lost,
        beyond=whole.beyond(lambda path: modules[path].scale),
        full_rank=full_rank,
        method=method,
        notes=(*notes, *whole.notes),
    )
