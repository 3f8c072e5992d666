"""LoftQ (Li et al. 2023) and QPiSSA: a quantized base Q, and an initial adapter for what quantization lost.

On W0 the update is [B, -B0] [A; A0] as far as low rank goes: W0 - Q - P0 is of full rank and stays behind. LoftQ's
B0 A0 is the best rank-r part of W0 - Q and was made without the scale, so that is subtracted.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from statistics import median

from converters import lora
from converters.detect_weights import kinship, spread
from converters.fresh import check_orthogonal, likeness
from converters.initial import Rules, left_beside, read_without_initial
from converters.kinship import KINSHIP
from converters.reading import Inputs, Reading
from converters.residual import base_beside
from converters.source import Source, open_source
from gora_serve.errors import BindingError, GoraError

NOTE = "Trained over a quantized base; what quantization took beyond P0 has full rank and is not in the result."
LOFTQ, PISSA = "loftq", "pissa"
PART, LOST = 0.7, 0.4  # cosine of P0 with the part of W0 in its columns


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoftQ or QPiSSA. Raises UsageError GS-232 without P0."""
    inputs.need_base("LoftQ replaces the base; its conversion")
    scaled = _which(source, inputs) == PISSA
    rules = Rules(
        "loftq",
        check=check_orthogonal,
        quantized=True,
        unscaled=not scaled,
        untransposed=not scaled,
        mutated=base_beside(source, inputs),
        notes=(NOTE, f"B0 A0 is taken {'with' if scaled else 'without'} the scale, as {_NAMES[scaled]} makes it."),
    )
    return read_without_initial(source, inputs, rules)


_NAMES = {True: "QPiSSA", False: "LoftQ"}


def _which(source: Source, inputs: Inputs) -> str:
    """Return LOFTQ or PISSA: by the configuration's word and by the initial adapter's numbers.

    QPiSSA's s B0 A0 is a part of W0, or nearly so after several iterations; LoftQ's B0 A0 is what quantization lost.
    Raises BindingError (GS-443) where the two say different things, or nothing.
    """
    text = str(source.config.get("init_lora_weights")).lower()
    word = next((kind for kind in (LOFTQ, PISSA) if text.startswith(kind)), None)
    folder = inputs.init_adapter or _found_folder(source, inputs)
    if folder is None:
        return word or LOFTQ
    base, origin = inputs.need_base("LoftQ"), open_source(folder, pickles=inputs.pickles)
    stored = lora.modules_of(origin, inputs)
    paths = spread([path for path in stored if not base.is_embedding(path)])
    like = median(likeness(base.weight(path), stored[path]) for path in paths) if paths else 0.0
    numbers = PISSA if like > PART else LOFTQ if like < LOST else None
    found = {kind for kind in (word, numbers) if kind}
    if len(found) != 1:
        raise BindingError(
            "it is not clear whether the initial adapter is LoftQ's or QPiSSA's, whose scales differ", code="GS-443",
            file=origin.weights, actual=f"init_lora_weights {text}; a cosine of {like:.2f} with the base's own part",
            expected=f"above {PART} for QPiSSA, below {LOST} for LoftQ, as init_lora_weights says",
            hint='set init_lora_weights to "loftq" or "pissa" in adapter_config.json, as in training',
        )  # fmt: skip
    return found.pop()


def _found_folder(source: Source, inputs: Inputs) -> Path | None:
    """Return the initial adapter that lies beside this one, if its numbers say that it is this one's."""
    trained = lora.modules_of(source, inputs)
    for folder in left_beside(source, inputs.mutated_base or base_beside(source, inputs)):
        with suppress(GoraError):
            origin = open_source(folder, pickles=inputs.pickles)
            if kinship(trained, lora.modules_of(origin, inputs)) >= KINSHIP:
                return folder
    return None
