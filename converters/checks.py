"""What every factor has to be before anything is computed with it: floating-point numbers, in a shape that can be.

By the headers alone, so that a wrong file costs neither memory nor time. One place for all families.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from converters.reading import Inputs
from converters.source import Source
from gora_serve.errors import InputError

FLOATS = ("F16", "BF16", "F32", "F64")
AGAIN = "save the adapter again, whole, with the tool that wrote it"


def check_numbers(source: Source, names: Iterable[str]) -> None:
    """Raise InputError (GS-3140) for a tensor that holds anything but floating-point numbers of 16 bits or more."""
    for name in names:
        dtype = source.tensors.entries[name].dtype
        if dtype not in FLOATS:
            raise InputError(
                "a factor holds values of an unusual type: what they stand for is not known", code="GS-3140",
                file=source.tensors.files[name], tensor=name, expected=", ".join(FLOATS), actual=dtype,
                hint="save the adapter in float32 or bfloat16; a quantized one has to be dequantized first",
            )  # fmt: skip


def check_pair(source: Source, A: str, B: str, *, by_columns: bool = False) -> None:
    """Refuse factors that are no pair: A (r, in) and B (out, r), or A (in, r) and B (r, out) by columns.

    Raises InputError: GS-3140 for their type, GS-3207 for their shapes.
    """
    check_numbers(source, (A, B))
    of_A, of_B = source.tensors.shape(A), source.tensors.shape(B)
    fits = len(of_A) == len(of_B) == 2 and 0 not in (*of_A, *of_B)
    if not fits or (of_A[1] != of_B[0] if by_columns else of_A[0] != of_B[1]):
        raise InputError(
            "A and B of a module do not fit", code="GS-3207", file=source.tensors.files[B], tensor=B,
            expected=("A (in, r) and B (r, out)" if by_columns else "A (r, in) and B (out, r)") + ", r of at least 1",
            actual=f"A {of_A}, B {of_B}", hint=AGAIN,
        )  # fmt: skip


def check_shape(source: Source, name: str, expected: Sequence[int | None]) -> None:
    """Refuse a tensor of another shape; None stands for any size of at least 1. Raises InputError (GS-3141)."""
    actual = source.tensors.shape(name)
    if len(actual) == len(expected) and all(
        size == one if one is not None else size > 0 for size, one in zip(actual, expected, strict=True)
    ):
        return
    words = ", ".join("n" if one is None else str(one) for one in expected)
    raise InputError(
        "a tensor of the adapter has a shape that cannot be", code="GS-3141", file=source.tensors.files[name],
        tensor=name, expected=f"({words})", actual=actual, hint=AGAIN,
    )  # fmt: skip


def check_fits(inputs: Inputs, path: str, shape: tuple[int, int]) -> None:
    """Raise BindingError (GS-405) for an update (out, in) that is not of the base's module, where a base was given."""
    if inputs.base is not None:
        inputs.base.check_shape(path, shape)
