"""Whether an adapter that nothing binds to a base can belong to it at all: modules, shapes, and that it is whole.

Names differ between checkpoints, transformers' versions and engines, so a module is known by the numbers in its path
and its last name. What cannot be told by these passes: the engine has the last word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gora_serve.errors import BindingError, InputError
from gora_serve.integrity.digest import TensorRecord
from gora_serve.serving.adapter_dir import AdapterDir
from gora_serve.serving.preflight import FLOATS

Place = tuple[tuple[str, ...], str]
RIGHT_BASE = "give the base that the adapter was trained on"
_SHOWN = 5
# Keys that make PEFT leave out some of the modules that target_modules names.
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def place_of(module: str) -> Place:
    """Return the numbers in a module's path (layer, expert) and its last name."""
    parts = module.split(".")
    return tuple(part for part in parts if part.isdecimal()), parts[-1]


def check_fit(adapter: AdapterDir, tensors: Mapping[str, TensorRecord], *, same_names: bool) -> None:
    """Raise BindingError for modules that the base lacks (GS-471) or has in another shape (GS-472), InputError where
    modules are missing that the configuration names (GS-3220). All are counted, the first five named.

    tensors: those of the base. same_names: its files name every layer as adapters do, so that a name that is nowhere
    in them is no module.
    """
    places = {place_of(name.rpartition(".")[0]) for name in tensors}
    names = {leaf for _, leaf in places}
    strange = [
        module
        for module in adapter.pairs
        if (place := place_of(module)) not in places and place[0] and (same_names or place[1] in names)
    ]
    if strange:
        raise BindingError(
            f"{_count(strange, adapter)} are not in the base: {_named(strange)}", code="GS-471",
            file=adapter.weights_file, tensor=strange[0], hint=RIGHT_BASE,
        )  # fmt: skip
    _check_shapes(adapter, tensors)
    if same_names:
        _check_whole(adapter, places)


def _check_shapes(adapter: AdapterDir, tensors: Mapping[str, TensorRecord]) -> None:
    shapes: dict[Place, list[tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in FLOATS:
            shapes.setdefault(place_of(name.removesuffix(".weight")), []).append(tensor.shape)
    found = {module: (pair.B.shape[0], pair.A.shape[1]) for module, pair in adapter.pairs.items() if pair.A and pair.B}
    wrong = {
        module: known
        for module, shape in found.items()
        if (known := shapes.get(place_of(module))) and shape not in known and shape[::-1] not in known
    }
    if wrong:
        first = next(iter(wrong))
        raise BindingError(
            f"{_count(wrong, adapter)} have another shape than the base's: {_named(wrong)}", code="GS-472",
            file=adapter.weights_file, tensor=first, expected=f"(out, in) {wrong[first][0]}", actual=found[first],
            hint=RIGHT_BASE,
        )  # fmt: skip


def _check_whole(adapter: AdapterDir, places: Collection[Place]) -> None:
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or any(adapter.config.get(key) for key in _NARROWING):
        return
    wanted = {place for place in places if place[0] and place[1] in targets}
    missing = sorted(wanted - {place_of(module) for module in adapter.pairs})
    if missing:
        shown = [".".join((*numbers, leaf)) for numbers, leaf in missing]
        raise InputError(
            f"the adapter lacks {len(missing)} of the {len(wanted)} modules that its target_modules names:"
            f" {_named(shown)}", code="GS-3220", file=adapter.weights_file, tensor=shown[0],
            hint="fetch the adapter again, whole; or name in target_modules the paths of the modules that it has",
        )  # fmt: skip


def _count(some: Collection[str], adapter: AdapterDir) -> str:
    return f"{len(some)} of the adapter's {len(adapter.pairs)} modules"


def _named(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more
