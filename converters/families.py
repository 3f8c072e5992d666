"""The families by name: the one table that `--from` and detection choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters import corda, kasa, loftq, lora, lora_ga, olora, pissa, residual
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
    Family("pissa", "PiSSA of PEFT, exact or by a randomized SVD", pissa.read),
    Family("olora", "OLoRA of PEFT", olora.read),
    Family("corda", "CorDA of PEFT", corda.read),
    Family("lora_ga", "LoRA-GA of PEFT and of its official fork", lora_ga.read),
    Family("loftq", "LoftQ and QPiSSA, over a quantized base", loftq.read),
    Family("residual", "official PiSSA, MiLoRA and the like, over a residual model", residual.read),
    Family("kasa", "KaSA of PEFT", kasa.read),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
