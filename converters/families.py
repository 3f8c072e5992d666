"""The families by name: the one table that `--from` and detection choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters import lora
from converters.reading import Inputs, Reading
from converters.source import Source


@dataclass(frozen=True)
class Family:
    """A family's reader, and in half a line what it is."""

    name: str
    about: str
    read: Callable[[Source, Inputs], Reading]


_ALL = (Family("lora", "plain LoRA of PEFT, EVA, LoRA+, LoRA-FA", lora.read),)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
