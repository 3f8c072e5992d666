"""LoftQ (Li et al. 2023) and QPiSSA: a quantized base Q, and an initial adapter for what quantization lost.

On W0 the update is [B, -B0] [A; A0] as far as low rank goes: W0 - Q - P0 is of full rank and stays behind. LoftQ's
B0 A0 is the best rank-r part of W0 - Q and was made without the scale, so that is subtracted.
"""

from __future__ import annotations

from functools import partial

from converters import lora
from converters.fresh import ROUNDED, check_orthogonal, off_projection
from converters.initial import Rules, initial_folder, read_without_initial
from converters.reading import Inputs, Reading
from converters.residual import base_beside
from converters.source import Source, open_source

NOTE = "Trained over a quantized base; what quantization took beyond P0 has full rank and is not in the result."
LOFTQ, PISSA = "loftq", "pissa"


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoftQ or QPiSSA. Raises UsageError GS-232 without P0."""
    base = inputs.need_base("LoftQ replaces the base; its conversion")
    scaled = _which(source, inputs) == PISSA
    rules = Rules(
        "loftq",
        check=partial(check_orthogonal, base),
        quantized=True,
        unscaled=not scaled,
        untransposed=not scaled,
        mutated=base_beside(source, inputs),
        notes=(NOTE, f"B0 A0 is taken {'with' if scaled else 'without'} the scale, as {_NAMES[scaled]} makes it."),
    )
    return read_without_initial(source, inputs, rules)


_NAMES = {True: "QPiSSA", False: "LoftQ"}


def _which(source: Source, inputs: Inputs) -> str:
    """Return LOFTQ or PISSA: by the initial adapter's numbers, or by the configuration's word where there is none.

    QPiSSA's s B0 A0 is a part of W0; LoftQ's B0 A0 is a part of what quantization lost.
    """
    folder = initial_folder(source, inputs, base_beside(source, inputs))
    if folder is None:
        return PISSA if str(source.config.get("init_lora_weights")).lower().startswith(PISSA) else LOFTQ
    base, stored = inputs.need_base("LoftQ"), lora.modules_of(open_source(folder, pickles=inputs.pickles), inputs)
    path = next((path for path in stored if not base.is_embedding(path)), None)
    return PISSA if path and off_projection(base.weight(path), stored[path]) < 5 * ROUNDED else LOFTQ
