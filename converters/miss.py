"""MiSS, and Bone as it was called before: one small block, added to every stretch of r columns (Kang et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from converters.parts import parts_of, reading_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.linalg import as_factors
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError

BLOCKS = ("miss_block", "bone_block")


def read(source: Source, inputs: Inputs) -> Reading:
    """Read MiSS or Bone; the shape of the block tells the kind, and the base how wide a module is.

    Standard: block (r, out), delta[:, j] = block[j mod r], exactly of rank r. `mini`: block (r, out / n), repeated n
    times along out. `bat`: blocks (out / r, r, r), delta depends on W0 and has full rank. Raises BindingError (GS-452)
    for a block that does not fit the base.
    """
    base = inputs.need_base("MiSS")
    parts = parts_of(source, BLOCKS, [[name] for name in BLOCKS])
    names = {path: next(iter(one.values())) for path, one in parts.items()}
    bat = any(len(source.tensors.shape(name)) == 3 for name in names.values())

    def factors(path: str) -> LoraFactors:
        block = source.tensors[names[path]].double()
        _check(path, block, base)
        return as_factors(_bat(block, base.weight(path).double())) if block.ndim == 3 else _low_rank(block, path, base)

    def sizes(path: str) -> Tensor:
        return _bat(source.tensors[names[path]].double().abs(), base.weight(path).double().abs())

    method = "blocks of (W0 B + B)" if bat else "the block times a matrix that sums columns, rank r"
    modules = LazyModules(parts, factors)
    reading = reading_of(source, inputs, modules, parts, method=method, full_rank=bat)
    return replace(reading, beyond=replace(reading.beyond, sizes=sizes if bat else None))


def _low_rank(block: Tensor, path: str, base: BaseWeights) -> LoraFactors:
    out_features, in_features = base.shape(path)
    rank = block.shape[0]
    A = torch.eye(rank, dtype=block.dtype).repeat(1, -(-in_features // rank))[:, :in_features]  # (r, in)
    B = block.repeat(1, out_features // block.shape[1]).T  # (out, r)
    return LoraFactors(A, B, 1.0)


def _bat(blocks: Tensor, W: Tensor) -> Tensor:
    """Return delta (out, in): of its r x r block (i, j), W_ij B_i + B_i."""
    count, rank, _ = blocks.shape
    tiles = W.reshape(count, rank, W.shape[1] // rank, rank).permute(2, 0, 1, 3)  # (in / r, out / r, r, r)
    return (tiles @ blocks + blocks).permute(1, 2, 0, 3).reshape(W.shape)


def _check(path: str, block: Tensor, base: BaseWeights) -> None:
    out_features, in_features = base.shape(path)
    if 0 in block.shape:
        fits = False
    elif block.ndim == 3:
        count, rank, columns = block.shape
        fits = columns == rank and count * rank == out_features and in_features % rank == 0
    else:
        fits = block.ndim == 2 and block.shape[0] <= in_features and out_features % block.shape[1] == 0
    if not fits:
        raise BindingError(
            "the block does not fit this base", code="GS-452", file=base.folder, tensor=path,
            expected="(r, out), (r, a divisor of out) or (out / r, r, r)",
            actual=f"{tuple(block.shape)} for (out, in) {(out_features, in_features)}",
            hint="give the base that the adapter was trained on",
        )  # fmt: skip
