"""Module paths as the base has them, where an adapter of the model without its head lacks their first part.

PEFT passes over `layers.0.self_attn.q_proj` without a word where the model calls it `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from converters.reading import Beyond, Inputs, Reading
from converters.source import Source
from gora_serve.adapter.tensors import Renamed
from gora_serve.deploy.base import SAVE_AGAIN, BaseWeights
from gora_serve.errors import BindingError

FEATURES = "its modules are named as in the model without a head: PEFT loads it over AutoModel, and no engine"
Name = Callable[[str], str]
Value = TypeVar("Value")


def by_base_names(source: Source, reading: Reading, inputs: Inputs) -> Reading:
    """Return the reading with the paths under which PEFT finds the modules in the base's model; for merging into a
    model, those of the base's files. What was renamed, no engine finds by the names in the file.

    Raises BindingError for a module with two names (GS-454), and where the base's own lack that part (GS-453).
    """
    base = inputs.base
    if base is None:
        return reading
    names = _parameters(reading)
    check_names([(source.weights, names)], base)
    own = {name: base.own_name(name) for name in names}
    new = own if inputs.merging else {name: base.name_in_model(name, source.config) for name in names}
    renamed = {name: new[name] for name in names if new[name] != name}
    lacking = next((name for name in names if len(own[name]) > len(name)), None)
    if not inputs.merging and lacking and not renamed and not base.is_trunk:
        return replace(reading, served=None, notes=(*reading.notes, FEATURES))
    if not renamed:
        return reading
    reading = _renamed(reading, lambda name: renamed.get(name, name))
    if inputs.merging:
        return reading
    before, after = (one.removesuffix(".weight") for one in next(iter(renamed.items())))
    note = f"the names lack the first part of the base's, which PEFT and engines go by: {before} is {after}"
    return replace(reading, served=None, notes=(*reading.notes, note))


def names_of(reading: Reading) -> list[str]:
    """Return the parameters, by their paths, that the adapter updates or carries."""
    return [*_weights(reading.adapter.modules), *reading.adapter.carried]


def check_names(adapters: Iterable[tuple[Path, Iterable[str]]], base: BaseWeights) -> None:
    """Raise BindingError (GS-454) where two parameters are one of the base's, by names with and without a first part.

    adapters: the file and the parameters of each.
    """
    seen: dict[str, str] = {}
    for file, names in adapters:
        for name in names:
            other = seen.setdefault(base.own_name(name), name)
            if other != name:
                hint = "write into adapter_config.json the task_type that each adapter was trained for"
                raise BindingError(
                    "one module has two names, of the model with its head and of the one without", code="GS-454",
                    file=file, tensor=name, expected=other, actual=name, hint=SAVE_AGAIN if base.is_bare else hint,
                )  # fmt: skip


def _weights(paths: Iterable[str]) -> list[str]:
    return [f"{path}.weight" for path in paths]


def _parameters(reading: Reading) -> list[str]:
    beyond = reading.beyond
    modules = [*reading.adapter.modules, *(reading.served or ()), *(reading.initial or ()), *reading.adapter.embeddings]
    modules += [*beyond.magnitudes, *beyond.before, *beyond.grounds]
    others = [*reading.adapter.carried, *beyond.replaced, *beyond.added, *beyond.stacks]
    return list(dict.fromkeys([*_weights(modules), *others]))


def _under(values: Mapping[str, Value], name: Name) -> Mapping[str, Value]:
    return Renamed(values, {name(old): old for old in values})


def _renamed(reading: Reading, name: Name) -> Reading:
    """Return the reading with other names of parameters, and the modules' by those of their weights."""

    def module(path: str) -> str:
        return name(f"{path}.weight").removesuffix(".weight")

    adapter, beyond, sizes = reading.adapter, reading.beyond, reading.beyond.sizes
    back = {module(path): path for path in adapter.modules}
    return replace(
        reading,
        adapter=replace(
            adapter,
            modules=_under(adapter.modules, module),
            carried=_under(adapter.carried, name),
            embeddings=frozenset(map(module, adapter.embeddings)),
        ),
        served=None if reading.served is None else _under(reading.served, module),
        initial=None if reading.initial is None else _under(reading.initial, module),
        beyond=Beyond(
            replaced=_under(beyond.replaced, name),
            added=_under(beyond.added, name),
            magnitudes=_under(beyond.magnitudes, module),
            before=_under(beyond.before, module),
            stacks=_under(beyond.stacks, name),
            grounds=_under(beyond.grounds, module),
            sizes=None if sizes is None else lambda path: sizes(back[path]),
        ),
    )
