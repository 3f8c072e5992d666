"""The families by name: the one table that `--from` and detection choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters import (
    adalora,
    corda,
    dora,
    full,
    gora,
    hra,
    kasa,
    kohya,
    loftq,
    loha,
    lokr,
    lora,
    lora_ga,
    miss,
    mlx,
    olora,
    pissa,
    residual,
    torchtune,
    vera,
)
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.errors import UsageError


@dataclass(frozen=True)
class Family:
    """A family's reader, and in half a line what it is."""

    name: str
    about: str
    read: Callable[[Source, Inputs], Reading]


_ALL = (
    Family("lora", "plain LoRA of PEFT, EVA, LoRA+, LoRA-FA", lora.read),
    Family("adalora", "AdaLoRA of PEFT", adalora.read),
    Family("pissa", "PiSSA of PEFT, exact or by a randomized SVD", pissa.read),
    Family("olora", "OLoRA of PEFT", olora.read),
    Family("corda", "CorDA of PEFT", corda.read),
    Family("lora_ga", "LoRA-GA of PEFT and of its official fork", lora_ga.read),
    Family("loftq", "LoftQ and QPiSSA, over a quantized base", loftq.read),
    Family("residual", "official PiSSA, MiLoRA and the like, over a residual model", residual.read),
    Family("kasa", "KaSA of PEFT", kasa.read),
    Family("dora", "DoRA of PEFT, full rank", dora.read),
    Family("vera", "VeRA of PEFT", vera.read),
    Family("loha", "LoHa of PEFT", loha.read),
    Family("lokr", "LoKr of PEFT", lokr.read),
    Family("miss", "MiSS of PEFT, and Bone", miss.read),
    Family("hra", "HRA of PEFT", hra.read),
    Family("full", "a fully fine-tuned model, full rank", full.read),
    Family("gora", "GoRA of MyTransformers: weight_a and weight_b", gora.read),
    Family("mlx", "LoRA of mlx-lm: lora_a and lora_b, transposed", mlx.read),
    Family("torchtune", "LoRA of torchtune in its own names", torchtune.read),
    Family("kohya", "LoRA of kohya and LyCORIS: lora_down and lora_up, underscored names", kohya.read),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}


def family_named(name: str) -> Family:
    """Return a family. Raises UsageError (GS-234) for a name that is none."""
    if name not in FAMILIES:
        raise UsageError(
            f"there is no family {name}", code="GS-234", expected=f"auto, {', '.join(FAMILIES)}",
            hint="--from auto decides by the files",
        )  # fmt: skip
    return FAMILIES[name]
