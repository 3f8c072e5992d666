"""The families by name: the one table that `--from` and detection choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters import gora, kohya, lora, mlx, torchtune
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
    Family("gora", "GoRA of MyTransformers: weight_a and weight_b", gora.read),
    Family("mlx", "LoRA of mlx-lm: lora_a and lora_b, transposed", mlx.read),
    Family("torchtune", "LoRA of torchtune in its own names", torchtune.read),
    Family("kohya", "LoRA of kohya and LyCORIS: lora_down and lora_up, underscored names", kohya.read),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
