"""Which weight files of a base's folder vLLM 0.32 reads: it must be those that were hashed, and no other.

Facts of its DefaultModelLoader: `consolidated*.safetensors`, Mistral's own layout, come first and alone, unless
--load-format is given; else every `*.safetensors` of the folder, less what an index does not name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gora_serve.errors import BindingError, UsageError, listed
from gora_serve.integrity.layout import find_model, other_weights
from gora_serve.integrity.reading import changed_while_reading

BY_NAME = "consolidated"
BY_INDEX = ("hf", "safetensors", "fastsafetensors", "instanttensor")  # formats that never look for those


def refuse_other_weights(base: Path, load_format: str | None = None) -> tuple[str, ...]:
    """Return the weight files that lie beside the model's, of which the engine reads none.

    load_format: as vLLM's option has it; None is its own choice. Raises BindingError (GS-4360) where it would read
    weights that are not the model that was hashed, UsageError (GS-284) for a format that reads other files.
    """
    if load_format not in (None, "auto", *BY_INDEX):
        raise UsageError(
            f"--load-format {load_format} cannot be passed on: it reads other files than those that are verified",
            code="GS-284", expected=", ".join(("auto", *BY_INDEX)), hint="leave the option out",
        )  # fmt: skip
    beside = others = other_weights(base)
    hint = "move them out of the folder: they are leftovers, or the model in another layout"
    if find_model(base).placed is not None:  # the index keeps others out, but for those that come first
        others = [name for name in others if name.startswith(BY_NAME) and load_format not in BY_INDEX]
        hint = "they are leftovers, or the model in Mistral's layout: -- --load-format hf reads what the index names"
    if others:
        raise BindingError(
            "vLLM would read weight files that are no part of the model that is verified", code="GS-4360",
            file=base / others[0], actual=listed(others), hint=hint,
        )  # fmt: skip
    return tuple(beside)


def refuse_new_weights(base: Path, beside: Sequence[str]) -> None:
    """Raise MismatchError (GS-101) where other weight files than `beside` lie beside the model's by now."""
    for name in other_weights(base):
        if name not in beside:
            raise changed_while_reading(base / name)
