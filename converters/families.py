"""The families by name: the one table that `--from` and detection choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters import dora, full, hra, loha, lokr, lora, miss, vera
from converters.reading import Inputs, Reading
from converters.source import Source


@dataclass(frozen=True)
class Family:
    """A family's reader, and in half a line what it is."""

    name: str
    about: str
    read: Callable[[Source, Inputs], Reading]


_ALL = (
    Family("lora", "plain LoRA of PEFT, EVA, LoRA+, LoRA-FA", lora.read),
    Family("dora", "DoRA of PEFT, full rank", dora.read),
    Family("vera", "VeRA of PEFT", vera.read),
    Family("loha", "LoHa of PEFT", loha.read),
    Family("lokr", "LoKr of PEFT", lokr.read),
    Family("miss", "MiSS of PEFT, and Bone", miss.read),
    Family("hra", "HRA of PEFT", hra.read),
    Family("full", "a fully fine-tuned model, full rank", full.read),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
