"""From what a plan says of a tensor to its sum: the factors that belong there, read, checked and turned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import full_update
from gora_serve.deploy.base import BaseWeights, misfit
from gora_serve.deploy.gap import Requantize
from gora_serve.deploy.merge_values import TORCH, Piece, Target
from gora_serve.deploy.sums import Dense, Replaced, Rescaled, Stacked, Sum, Term, as_matrix, low_rank
from gora_serve.deploy.update import check_size, diverged
from gora_serve.errors import InputError

NARROW = {"F16", "BF16"}  # types whose sums are taken in float32; those of others in float64, to be rounded once too


@dataclass(frozen=True)
class FourBits:
    """Bases in 4 bits. requantize: rounds a weight. add_to: whether updates are added to what it makes of weights.
    compared: whether both ways are held against the model in training, which there is for one adapter alone."""

    requantize: Requantize
    add_to: bool
    compared: bool = True


def sum_of(base: BaseWeights, target: Target, four_bits: FourBits | None = None) -> Sum | None:
    """Return the sum of a target, None for one that stays as it is. Raises InputError (GS-3105) for NaN and absurd
    numbers, BindingError (GS-405) for an update of another shape."""
    on_four_bits = target.in_4_bits and four_bits is not None and four_bits.add_to
    if not target.pieces and not on_four_bits:
        return None
    source = base.tensors.entries[target.source].dtype if target.source else target.dtype
    dtype = torch.float64 if {source, target.dtype} - NARROW else torch.float32
    turned = base.is_transposed(target.module)
    grounds = (piece.part.grounds.get(piece.key) for piece in target.pieces)
    ground = next((one for one in grounds if one is not None), None)
    terms = tuple(_terms(base, target, dtype, ground, turned=turned))
    stored = Sum(as_matrix(target.shape), terms, dtype, ground, sizes=_sizes(target, turned=turned))
    if four_bits is None or not target.in_4_bits:
        return stored
    four = four_bits.requantize(base.weight(target.module))
    four = four.T.contiguous() if turned else four
    if turned and any(piece.kind == "magnitude" for piece in target.pieces):  # lengths of whole columns, of this weight
        terms = tuple(_terms(base, target, dtype, four, turned=turned))
    trained = replace(stored, terms=terms, ground=four)
    both = (stored, trained) if four_bits.compared and target.pieces else None  # of adapted tensors alone
    return replace(trained if four_bits.add_to else stored, both=both)


def _sizes(target: Target, *, turned: bool) -> Callable[[], Tensor] | None:
    """Return what families say of the values that they add up: computed once, and only where it is asked for."""
    given = [(one.part.sizes, one) for one in target.pieces if one.kind == "module"]
    known = [(sizes, one) for sizes, one in given if sizes is not None]

    @cache
    def total() -> Tensor:
        found = torch.stack([sizes(one.key) * abs(one.part.weight) for sizes, one in known]).sum(0)
        return found.T if turned else found

    return total if known else None


def _terms(base: BaseWeights, target: Target, dtype: torch.dtype, ground: Tensor | None, *, turned: bool) -> list[Term]:
    thin: list[tuple[float, LoraFactors]] = []
    terms: list[Term] = []
    for piece in target.pieces:
        if piece.kind in ("module", "magnitude"):
            factors = piece.part.modules[piece.key]
            _check(base, target, piece, factors, turned=turned)
            full = full_update(factors)
            if piece.kind == "magnitude":
                m = _magnitude(piece)
                if turned:
                    W = base.weight(piece.key) if ground is None else ground.T
                    terms.append(_rescaled_columns(W.double(), factors, m, piece.part.weight))
                else:
                    A, B = factors.A.to(dtype), (factors.B.double() * factors.scale).to(dtype)
                    terms.append(Rescaled(A.contiguous(), B.contiguous(), m, piece.part.weight))
            elif full is not None:
                terms.append(Dense(full.T if turned else full, piece.part.weight))
            else:
                thin.append((piece.part.weight, factors))
        else:
            terms.append(_other(target, piece, dtype))
    return [low_rank(thin, dtype, turned=turned), *terms] if thin else terms


def _check(base: BaseWeights, target: Target, piece: Piece, factors: LoraFactors, *, turned: bool) -> None:
    shape = as_matrix(target.shape)
    expected = shape[::-1] if turned else shape
    if factors.shape != expected:
        raise misfit(piece.part.file, piece.key, f"(out, in) {expected}", factors.shape)
    check_size(piece.key, factors, file=piece.part.file)


def _magnitude(piece: Piece) -> Tensor:
    m = piece.part.magnitudes[piece.key].double().flatten()
    if not m.isfinite().all():
        raise diverged("the magnitude holds NaN or infinite values", piece.part.file, piece.key)
    return m


def _rescaled_columns(W: Tensor, factors: LoraFactors, m: Tensor, weight: float) -> Dense:
    """DoRA of a Conv1D, whose rows lie as columns, at once. W: (out, in), what the update is added to. m: (out,)."""
    A, B = factors.A.double(), factors.B.double() * factors.scale
    moved = W + B @ A
    share = (m / moved.norm(dim=1))[:, None]
    sizes = share * (W.abs() + B.abs() @ A.abs())
    return Dense((share * moved - W).T.contiguous(), weight, sizes.T.contiguous(), m.shape[0])


def _other(target: Target, piece: Piece, dtype: torch.dtype) -> Term:
    if piece.kind == "stack":
        experts = piece.part.stacks[piece.key]
        A, B = experts.A.double(), experts.B.double() * piece.part.weight
        if experts.turned:
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        return Stacked(A.to(dtype).contiguous(), B.to(dtype).contiguous())
    tensor = piece.part.replaced[piece.key] if piece.kind == "replaced" else piece.part.added[piece.key]
    if tuple(tensor.shape) != target.shape:
        raise misfit(piece.part.file, piece.key, target.shape, tuple(tensor.shape))
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise diverged("a module that is taken whole holds NaN or infinite values", piece.part.file, piece.key)
    matrix = tensor.reshape(as_matrix(target.shape))
    if piece.kind == "added":
        return Dense(matrix, piece.part.weight)
    return Replaced(matrix, piece.part.weight)


def refuse_odd(base: BaseWeights, target: Target) -> InputError:
    """Return the error for a sum that is not finite: the base's own fault (GS-3142), or the type's (GS-3401)."""
    if target.source is not None and not base.tensors[target.source].isfinite().all():
        return InputError(
            "the model holds NaN or infinite values", code="GS-3142", file=base.tensors.files[target.source],
            tensor=target.source,
            hint="fetch it again; if it was trained, training diverged: use an earlier checkpoint",
        )  # fmt: skip
    return InputError(
        f"the merged weight holds values that {TORCH.get(target.dtype, target.dtype)} cannot", code="GS-3401",
        file=base.folder, tensor=target.name,
        hint="--dtype bfloat16 or float32; if it is so in these, training diverged",
    )  # fmt: skip
