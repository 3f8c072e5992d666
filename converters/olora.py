"""OLoRA of PEFT (Büyükakyüz 2024): QR of W0; B0 = Q_r, A0 = R_r, and P0 = s Q_r R_r, the scale not divided out.

Q_r R_r is the projection of W0 on its first r columns, so it is unique and computed again. PEFT takes Conv1D's weight
as it lies, (in, out): there the base lost the transpose of what the adapter holds.
"""

from __future__ import annotations

from pathlib import Path

from converters import lora
from converters.decompose import first_columns, transposed
from converters.fresh import allowed
from converters.initial import Rules, read_without_initial
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import distance, norm
from gora_serve.errors import BindingError


def read(source: Source, inputs: Inputs) -> Reading:
    """Read OLoRA. Raises BindingError (GS-433) for an initial adapter that is not the QR of this base."""
    base = inputs.need_base("OLoRA edits the base; its conversion")
    trained = lora.modules_of(source, inputs)

    def compute(path: str, rank: int) -> LoraFactors:
        scale = trained[path].scale
        if base.is_transposed(path):
            part = transposed(first_columns(base.weight(path).T, rank))
        else:
            part = first_columns(base.weight(path), rank)
        return LoraFactors(part.A, part.B, scale)

    def check(path: str, initial: LoraFactors, file: Path) -> None:
        expected = compute(path, initial.rank)
        off = distance(initial, expected) / norm(expected)
        if off > allowed(initial):
            raise BindingError(
                "the initial adapter is not the QR decomposition of this base", code="GS-433", file=file, tensor=path,
                expected="B0 A0 = W0 projected on its first r columns", actual=f"{off:.1%} of it is off",
                hint="give the initial adapter of the same run, or none: OLoRA's is computed from the base",
            )  # fmt: skip

    computed = "initial is s times the projection of W0 on its first r columns (QR)"
    rules = Rules(
        "olora", compute, computed, check, lambda path, initial: compute(path, initial.rank), untransposed=True
    )
    return read_without_initial(source, inputs, rules)
