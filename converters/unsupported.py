"""Families of PEFT that have no plain LoRA: they multiply, are sparse, or do not update weights at all."""

from __future__ import annotations

from collections.abc import Mapping

from converters.source import Source
from gora_serve.errors import InputError

_MULTIPLIES = "it multiplies the base's weights or activations: the update has full rank"
_SPARSE = "it changes scattered entries or frequencies of the weights: the update has full rank"
_PROMPT = "it adds tokens or states to the input and changes no weight"
_INPUT = "its update depends on the input, so that no fixed one is the same"
_OWN = "its update comes from a parametrization of its own, which is not read here"

UNSUPPORTED: Mapping[str, str] = {
    "IA3": _MULTIPLIES,
    "OFT": _MULTIPLIES,
    "BOFT": _MULTIPLIES,
    "HIRA": _MULTIPLIES,
    "ROAD": _MULTIPLIES,
    "GLORA": _MULTIPLIES,
    "DEFT": _MULTIPLIES,
    "OSF": _MULTIPLIES,
    "FROD": _MULTIPLIES,
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "FOURIERFT": _SPARSE,
    "WAVEFT": _SPARSE,
    "C3A": _SPARSE,
    "RANDLORA": _OWN,
    "DELORA": _OWN,
    "GRALORA": _OWN,
    "ADAMSS": _OWN,
    "TINYLORA": _OWN,
    "PSOFT": _OWN,
    "VBLORA": _OWN,
    "UNILORA": _OWN,
    "LILY": _OWN,
    "BEFT": "it trains biases alone",
    "LN_TUNING": "it trains norms alone",
    "PVERA": _INPUT,
    "PEANUT": _INPUT,
    "SHADOW": _INPUT,
    "XLORA": _INPUT,
    "POLY": _INPUT,
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
}
_NO_MERGE = (_PROMPT, _INPUT)


def refuse_unsupported(source: Source) -> None:
    """Raise InputError (GS-3156) for a checkpoint of a family that has no plain LoRA."""
    family = str(source.config.get("peft_type", ""))
    reason = UNSUPPORTED.get(family)
    if reason is None:
        return
    merged = "merge it with the tool that made it, and convert the merged model: --from full"
    raise InputError(
        f"{family} cannot be written as LoRA: {reason}", code="GS-3156", file=source.config_file, actual=family,
        hint="serve it with the tool that made it" if reason in _NO_MERGE else merged,
    )  # fmt: skip
