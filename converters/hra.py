"""HRA: the base's weight times a chain of r Householder reflections (Yuan et al. 2024): an update of rank r."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from converters.checks import check_shape
from converters.parts import parts_of, reading_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.peft_config import flag

PART = "hra_u"


def read(source: Source, inputs: Inputs) -> Reading:
    """Read HRA: delta = W0 (H_1 ... H_r - I), H_i = I - 2 u_i u_iᵀ / |u_i|², exactly of rank r at most.

    With apply_GS the u are made orthonormal first, which turns the product into I - 2 U Uᵀ. Needs the base.
    """
    base = inputs.need_base("HRA")
    parts = parts_of(source, [PART], [[PART]])
    for path, one in parts.items():
        out_features, in_features = base.shape(path)
        check_shape(source, one[PART], (None, None))
        rows, rank = source.tensors.shape(one[PART])
        base.check_shape(path, (out_features, rows))
        check_shape(source, one[PART], (in_features, min(rank, in_features)))
    orthonormal = flag(source.config, "apply_GS", file=source.config_file)

    def chain(path: str) -> tuple[Tensor, Tensor]:
        u = source.tensors[parts[path][PART]]  # (in, r)
        U = _gram_schmidt(u).double() if orthonormal else torch.nn.functional.normalize(u.double(), dim=0, eps=0)
        return U, -2 * U if orthonormal else _chain(U)

    def factors(path: str) -> LoraFactors:
        U, P = chain(path)
        return LoraFactors(U.T.contiguous(), base.weight(path).double() @ P, 1.0)

    def sizes(path: str) -> Tensor:
        """|W0| |H|, H being the product, as other tools multiply it."""
        U, P = chain(path)
        W = base.weight(path).double().abs()
        return W + W @ P.abs() @ U.T.abs()

    method = f"W0 (product of reflections - I), rank r{', orthonormalized' if orthonormal else ''}"
    reading = reading_of(source, inputs, LazyModules(parts, factors), parts, method=method)
    return replace(reading, beyond=replace(reading.beyond, sizes=sizes))


def _chain(U: Tensor) -> Tensor:
    """Return P (in, r) of H_1 ... H_r = I + P Uᵀ for U (in, r) with unit columns: p_i = -2 (u_i + P Uᵀ u_i)."""
    P = torch.zeros_like(U)
    for i in range(U.shape[1]):
        P[:, i] = -2 * (U[:, i] + P[:, :i] @ (U[:, :i].T @ U[:, i]))
    return P


def _gram_schmidt(u: Tensor) -> Tensor:
    """Return orthonormal columns (in, r), in u's own type and in PEFT's order of operations.

    HRA starts with equal pairs, whose difference is small after training: what is left of it is PEFT's rounding too.
    """
    columns: list[Tensor] = []
    for i in range(u.shape[1]):
        column = u[:, i].view(-1, 1)
        for earlier in columns:
            column = column - (earlier.t() @ column) * earlier
        columns.append(column / column.norm())
    return torch.cat(columns, dim=1)
