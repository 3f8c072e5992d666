"""Plain LoRA as PEFT saves it: A and B per module, scale alpha / r or alpha / √r, with rank and alpha patterns.

EVA, LoRA+, LoRA-FA, MiCA and VeLoRA are this on disk. The families that edit the base build on `factors_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.names import PREFIX, parse_key
from gora_serve.adapter.peft_config import foreign_scales, saved_modules
from gora_serve.errors import InputError


@dataclass(frozen=True)
class Pair:
    """The tensor names of a module's factors."""

    A: str
    B: str


def read(source: Source, inputs: Inputs) -> Reading:
    """Read plain LoRA. The update is what PEFT and vLLM apply: served and adapter are one."""
    pairs, saved = pairs_of(source), carried_of(source)
    modules = factors_of(source, pairs)
    carried = {parameter: source.tensors[name] for parameter, name in saved.items()}
    adapter = Adapter(modules, base_id(source), carried=carried, task_type=source.config.get("task_type"))
    applied = frozenset(name for pair in pairs.values() for name in (pair.A, pair.B))
    return Reading(adapter, applied, frozenset(saved.values()), served=modules, method="scale * B A")


def base_id(source: Source) -> BaseId:
    """Return the base that the configuration names, whoever that is; not hashed."""
    return BaseId(str(source.config.get("base_model_name_or_path") or ""), source.config.get("revision"))


def carried_of(source: Source) -> dict[str, str]:
    """Return the modules that PEFT saved whole (modules_to_save): parameter path -> tensor name."""
    saved = saved_modules(source.config, file=source.config_file)
    found = {}
    for name in source.tensors:
        parameter = name.removeprefix(PREFIX)
        module = parameter.rpartition(".")[0]
        if name.startswith(PREFIX) and any(module == one or module.endswith(f".{one}") for one in saved):
            found[parameter] = name
    return found


def pairs_of(source: Source) -> dict[str, Pair]:
    """Return the factors' names by module path. Raises InputError for a factor without its twin (GS-3108)."""
    parts: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        parsed = parse_key(name)
        if parsed:
            parts.setdefault(parsed[0], {})[parsed[1]] = name
    for found in parts.values():
        if found.keys() != {"A", "B"}:
            raise InputError(
                "a LoRA factor lacks its twin", code="GS-3108", file=source.weights, tensor=next(iter(found.values())),
                hint="fetch the adapter again; the file is not whole",
            )  # fmt: skip
    return {path: Pair(found["A"], found["B"]) for path, found in parts.items()}


def factors_of(source: Source, pairs: Mapping[str, Pair]) -> LazyModules:
    """Return the factors as stored, with PEFT's scale.

    Raises InputError for ranks that the configuration denies, and for factors that do not fit (GS-3207).
    """
    for pair in pairs.values():
        _check_shapes(source, pair)
    ranks = {path: source.tensors.shape(pair.A)[0] for path, pair in pairs.items()}
    scales = foreign_scales(source.config, ranks, file=source.config_file)
    return LazyModules(
        pairs, lambda path: LoraFactors(source.tensors[pairs[path].A], source.tensors[pairs[path].B], scales[path])
    )


def _check_shapes(source: Source, pair: Pair) -> None:
    of_A, of_B = source.tensors.shape(pair.A), source.tensors.shape(pair.B)
    if len(of_A) != 2 or len(of_B) != 2 or of_A[0] != of_B[1]:
        raise InputError(
            "A and B of a module do not fit", code="GS-3207", file=source.weights, tensor=pair.B,
            expected="A (r, in) and B (out, r)", actual=f"A {of_A}, B {of_B}", hint="save the adapter again, whole",
        )  # fmt: skip
