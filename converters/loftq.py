"""LoftQ (Li et al. 2023) and QPiSSA: a quantized base Q, and an initial adapter for what quantization lost.

On W0 the update is [B, -B0] [A; A0] as far as low rank goes: W0 - Q - P0 is of full rank and stays behind. LoftQ's
B0 A0 is the best rank-r part of W0 - Q and was made without the scale, so that is subtracted.
"""

from __future__ import annotations

from converters.initial import Rules, read_without_initial
from converters.reading import Inputs, Reading
from converters.residual import base_beside
from converters.source import Source

NOTE = "Trained over a quantized base; what quantization took beyond P0 has full rank and is not in the result."


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoftQ or QPiSSA (`pissa_init` beside it, or a name of PiSSA's). Raises UsageError GS-232 without P0."""
    mutated = base_beside(source, inputs)
    scaled = _is_pissa(source, inputs)
    rules = Rules("loftq", quantized=True, unscaled=not scaled, untransposed=not scaled, mutated=mutated, notes=(NOTE,))
    return read_without_initial(source, inputs, rules)


def _is_pissa(source: Source, inputs: Inputs) -> bool:
    word = str(source.config.get("init_lora_weights"))
    init = inputs.init_adapter.name if inputs.init_adapter else ""
    places = (source.folder, source.folder.parent)
    beside = any((place / "pissa_init").is_dir() for place in places)
    return word.startswith("pissa") or init.startswith("pissa") or (word != "loftq" and beside)
