"""VeRA: one pair of random matrices for all modules, scaled in each by two trained vectors (Kopiczko et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from converters.checks import check_pair
from converters.parts import Parts, parts_of, reading_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.errors import InputError

SHARED = ("base_model.vera_A", "base_model.vera_B")
LAMBDAS = ("vera_lambda_b", "vera_lambda_d")
LARGEST_RANK = 1 << 16  # PEFT's own default is 256


def read(source: Source, inputs: Inputs) -> Reading:
    """Read VeRA: delta = diag(b) B[:out] diag(d) A[:, :in], of rank r.

    The base says how wide a module is. Raises InputError GS-3152 for projections that do not fit the vectors.
    """
    base = inputs.need_base("VeRA")
    parts = parts_of(source, LAMBDAS, [LAMBDAS])
    shapes = {path: base.shape(path) for path in parts}
    shared = [name for name in SHARED if name in source.tensors]
    rank = _check_vectors(source, parts, shapes)
    if len(shared) == 1:
        raise InputError(
            "one of VeRA's two projections is missing", code="GS-3150", file=source.weights, tensor=shared[0],
            expected=" and ".join(SHARED), actual=shared[0], hint="fetch the adapter again; the file is not whole",
        )  # fmt: skip
    if shared:
        check_pair(source, *shared)
        A, B = (source.tensors[name] for name in shared)  # (r, largest in), (largest out, r)
    else:
        A, B = _rebuilt(source, shapes, rank)
        dtype = base.weight(next(iter(parts))).dtype
        A, B = A.to(dtype), B.to(dtype)  # PEFT moves them to the type of the layers that they serve
    _check(source, shapes, A, B, rank)

    def factors(path: str) -> LoraFactors:
        b, d = (source.tensors[parts[path][name]].double() for name in LAMBDAS)  # (out,), (r,)
        rows, columns = B[: b.shape[0]].double(), A[:, : shapes[path][1]].double()
        return LoraFactors(d[:, None] * columns, b[:, None] * rows, 1.0)

    found = "as saved" if shared else f"rebuilt from projection_prng_key {source.config['projection_prng_key']}"
    method = f"diag(b) B diag(d) A; projections {found}"
    return reading_of(source, inputs, LazyModules(parts, factors), parts, method=method, shared=shared)


def _check_vectors(source: Source, parts: Mapping[str, Parts], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return r, which all vectors d have, before anything of that size is made. Raises InputError (GS-3152)."""
    rank = source.tensors.shape(next(iter(parts.values()))[LAMBDAS[1]])[0:1]  # (r,), () of a number
    for path, one in parts.items():
        b, d = (source.tensors.shape(one[name]) for name in LAMBDAS)
        if b != (shapes[path][0],) or d != rank or not rank or not 0 < rank[0] <= LARGEST_RANK:
            raise _misfit(source, one[LAMBDAS[1]], f"b ({shapes[path][0]},) and d (r,)", f"b {b}, d {d}")
    return rank[0]


def _rebuilt(source: Source, shapes: dict[str, tuple[int, int]], rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT draws them on the CPU where they were not saved (`_init_vera_A_vera_B`).

    Kaiming uniform with gain √2: bound √(6 / fan-in), A (r, largest in) before B (largest out, r), one generator.
    """
    key, said = source.config.get("projection_prng_key"), source.config.get("r")
    if not isinstance(key, int) or not -(2**63) <= key < 2**64 or said != rank:
        raise InputError(
            "neither the projections of VeRA nor the key that they were drawn from", code="GS-3153",
            file=source.config_file, expected=f"projection_prng_key, and r {rank}",
            actual=f"{str(key)[:40]}, {str(said)[:40]}",
            hint="save it again with save_projection=True, or take adapter_config.json from the folder of the run",
        )  # fmt: skip
    generator = torch.Generator(device="cpu").manual_seed(key)
    largest_out, largest_in = (max(sizes) for sizes in zip(*shapes.values(), strict=True))

    def draw(*shape: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    A = draw(rank, largest_in)
    return A, draw(largest_out, rank)


def _check(source: Source, shapes: dict[str, tuple[int, int]], A: Tensor, B: Tensor, rank: int) -> None:
    needed = tuple(max(sizes) for sizes in zip(*shapes.values(), strict=True))
    if A.shape[0] != rank or B.shape[0] < needed[0] or A.shape[1] < needed[1]:
        expected = f"A ({rank}, {needed[1]} or more), B ({needed[0]} or more, {rank})"
        raise _misfit(source, SHARED[0], expected, f"A {tuple(A.shape)}, B {tuple(B.shape)}")


def _misfit(source: Source, tensor: str, expected: object, actual: object) -> InputError:
    return InputError(
        "the projections of VeRA do not fit its vectors or the base", code="GS-3152", file=source.weights,
        tensor=tensor, expected=expected, actual=actual, hint="give the base that the adapter was trained on",
    )  # fmt: skip
