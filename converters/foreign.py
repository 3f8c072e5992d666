"""What the adapters of other tools have in common: factors under other names, and bases that are addressed by them.

A tool's file translates one tensor name into (module path, "A" or "B"); pairing and finding the module in the base are
done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from converters.checks import check_pair
from converters.pairs import Pair
from converters.source import Source
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import InputError

Part = tuple[str, str]  # module path, "A" or "B"


def pair_up(source: Source, parse: Callable[[str], Part | None], *, by_columns: bool = False) -> dict[str, Pair]:
    """Return the tensor names of the factors by module path; names that `parse` does not know are left out.

    by_columns: A is (in, r) and B (r, out). Raises InputError: GS-3170 for two tensors that are one factor, GS-3171 for
    a factor without its twin, and what `check_pair` raises for two that do not fit.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        parsed = parse(name)
        if parsed is None:
            continue
        path, part = parsed
        other = parts.setdefault(path, {}).setdefault(part, name)
        if other != name:
            raise InputError(
                f"two tensors are the factor {part} of one module", code="GS-3170", file=source.weights, tensor=name,
                actual=f"{other} is it too: {path}", hint="convert the two adapters apart",
            )  # fmt: skip
    for path, found in parts.items():
        if found.keys() != {"A", "B"}:
            raise InputError(
                "a factor lacks its twin", code="GS-3171", file=source.weights, tensor=next(iter(found.values())),
                expected=f"both factors of {path}", hint="fetch the adapter again; the file is not whole",
            )  # fmt: skip
        check_pair(source, found["A"], found["B"], by_columns=by_columns)
    return {path: Pair(found["A"], found["B"]) for path, found in parts.items()}


def tensors_of(pairs: Iterable[Pair]) -> frozenset[str]:
    """Return the names of all tensors that are factors."""
    return frozenset(name for pair in pairs for name in (pair.A, pair.B))


def refuse_magnitudes(source: Source, suffix: str, tool: str) -> None:
    """Raise InputError (GS-3172) where the tool trained DoRA: its magnitudes make the update one of full rank."""
    found = next((name for name in source.tensors if name.endswith(suffix)), None)
    if found is not None:
        raise InputError(
            f"DoRA of {tool}: its magnitudes make the update one of full rank", code="GS-3172", file=source.weights,
            tensor=found, hint=f"merge it with {tool} itself, and convert the merged model with --from full and --rank",
        )  # fmt: skip


def module_path(base: BaseWeights, path: str) -> str:
    """Return the base's own path of a module that a tool may call without its first part (layers.0 for model.layers.0).

    A path that the base does not know at all is returned as it is: `convert` refuses it (GS-404).
    """
    base.need_model_names()
    name = base.find_parameter(f"{path}.weight")
    longer = name is not None and name.endswith(f".{path}.weight")
    return name.removesuffix(".weight") if longer and name is not None else path
