"""LoRA-GA (Wang et al. 2024): P0 = s B0 A0 from singular vectors of a gradient, which nothing brings back.

PEFT's `lora_ga` and the official fork's LORAGA. The fork saves `init_lora_checkpoint` with every checkpoint, and in the
end a subtracted adapter of doubled rank and alpha: exact but for rsLoRA, where doubling both makes it √2 too strong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters import lora
from converters.detect_weights import halves
from converters.fresh import check_orthogonal
from converters.initial import Rules, read_without_initial
from converters.pairs import pairs_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.names import pattern_key
from gora_serve.adapter.peft_config import LARGEST, flag, foreign_scales
from gora_serve.errors import InputError


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoRA-GA. Raises UsageError GS-232 without a source of P0, InputError GS-3132 (`_read_subtracted`)."""
    inputs.need_base("LoRA-GA edits the base; its conversion")
    rules = Rules("lora_ga", check=check_orthogonal)
    if source.config.get("peft_type") == "LORAGA":
        plain = replace(source, config={**source.config, "peft_type": "LORA"})
        if source.config.get("init_lora_weights") is True:
            return _read_subtracted(plain, inputs)
        reading = read_without_initial(plain, inputs, rules)
        return replace(reading, served=None)  # PEFT does not know LORAGA
    return read_without_initial(source, inputs, rules)


def _read_subtracted(source: Source, inputs: Inputs) -> Reading:
    """Read the fork's final adapter, [B, -B0] [A; A0], with the scale of the adapter that was trained.

    The fork doubles r and lora_alpha, and leaves the patterns alone. Raises InputError (GS-3132) where the halves of
    the factors are not alike: then it is unclear what was saved.
    """
    reading = lora.read(replace(source, config={**source.config, **_scales_of_halves(source)}), inputs)
    _check_halves(source, reading.adapter.modules)
    note = "The fork doubled rank and alpha; with rsLoRA that is √2 too strong, which is corrected here."
    notes = (note,) if flag(source.config, "use_rslora", file=source.config_file) else ()
    method = "scale * B A of the official fork's final adapter, with the scale it was trained with"
    return replace(reading, served=None, method=method, notes=(*reading.notes, *notes))


def _scales_of_halves(source: Source) -> dict[str, Any]:
    """Return the configuration's keys that give each module the scale of half its rank."""
    ranks = {path: source.tensors.shape(pair.A)[0] for path, pair in pairs_of(source).items()}
    config = source.config
    halved = {**config, "r": _half(config.get("r")), "lora_alpha": _half(config.get("lora_alpha"))}
    scales = foreign_scales(halved, {path: rank // 2 for path, rank in ranks.items()}, file=source.config_file)
    return {
        "rank_pattern": {pattern_key(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {pattern_key(path): scales[path] * rank for path, rank in ranks.items()},
        "use_rslora": False,
    }


def _half(value: object) -> object:
    return value / 2 if isinstance(value, int | float) and abs(value) <= LARGEST else value


def _check_halves(source: Source, modules: Mapping[str, LoraFactors]) -> None:
    odd = next((path for path, factors in modules.items() if factors.rank % 2), None)
    if odd is not None:
        raise InputError(
            "a converted adapter of the LoRA-GA fork has an even rank; this has not", code="GS-3132",
            file=source.weights, tensor=odd, actual=modules[odd].rank,
            hint='if it was not converted, set init_lora_weights to "lora_ga" and give --init-adapter',
        )  # fmt: skip
    found = halves(modules)
    if found is None or not found.parallel:
        raise InputError(
            "init_lora_weights is true, but this is no trained adapter less its initial one", code="GS-3132",
            file=source.weights, expected="halves [A; A0] and [B, -B0] that are alike", actual=str(found),
            hint='if it was not converted, set init_lora_weights to "lora_ga" and give --init-adapter',
        )  # fmt: skip
