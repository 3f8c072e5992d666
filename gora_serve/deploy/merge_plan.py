"""What becomes of each tensor of a base when adapters are merged into it: names and headers, no weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from gora_serve.adapter.format import CARRIED_DTYPES, DTYPES
from gora_serve.deploy.base import EMBEDDINGS, FLOATS, HEADS, BaseWeights, misfit
from gora_serve.deploy.merge_settings import check_vocabulary, new_config
from gora_serve.deploy.merge_values import Kind, ModelPlan, Part, Piece, Pieces, Target
from gora_serve.deploy.ties import parts_copy, share_out
from gora_serve.errors import InputError


def plan_merge(base: BaseWeights, parts: Sequence[Part], dtype: str, *, in_4_bits: Sequence[str] = ()) -> ModelPlan:
    """Decide about every tensor. dtype: "auto", or of all floating-point tensors. in_4_bits: the modules that lay so in
    training.

    Raises BindingError: GS-404 a module that the base lacks, GS-405 another shape, GS-4400 modules that share a tensor
    and are not updated alike, GS-4401 vocabularies that do not agree. InputError: GS-3117 a quantized base, GS-3400 a
    module replaced whole that the base lacks, by several adapters or in part, GS-3403 a resized vocabulary likewise.
    """
    by_path = _pieces(base, parts)
    shared, untied = share_out(base, by_path)
    fours = {base.find(path) for path in in_4_bits}
    targets = [_target(base, name, shared.get(name, ()), dtype, name in fours) for name in base.tensors]
    if untied is not None:
        targets.append(_untied_head(base, untied, dtype))
    targets += [_fresh(base, path, pieces, dtype) for path, pieces in by_path.items() if _lacks(base, path, pieces)]
    check_vocabulary(base, targets)
    untied_config = untied is not None or parts_copy(base, by_path)
    config, notes = new_config(base, parts, targets, dtype, untied=untied_config)
    return ModelPlan(tuple(targets), config, tuple(notes))


def _pieces(base: BaseWeights, parts: Sequence[Part]) -> Pieces:
    """Return the pieces by parameter path: `<module path>.weight`, `.bias`, or a fused parameter."""
    found: dict[str, list[Piece]] = {}
    for part in parts:
        for path in part.modules:
            base.shape(path)
            kind: Kind = "magnitude" if path in part.magnitudes else "module"
            found.setdefault(f"{path}.weight", []).append(Piece(part, kind, path))
        others: tuple[tuple[Kind, Iterable[str]], ...] = (
            ("replaced", part.replaced), ("added", part.added), ("stack", part.stacks)
        )  # fmt: skip
        for kind, paths in others:
            for path in paths:
                found.setdefault(path, []).append(Piece(part, kind, path))
    return {path: tuple(pieces) for path, pieces in found.items()}


def _lacks(base: BaseWeights, path: str, pieces: tuple[Piece, ...]) -> bool:
    if base.counterpart(path) is not None:
        return False
    piece = next((one for one in pieces if one.kind == "added"), pieces[0])
    if piece.kind == "added":
        raise InputError(
            "lora_bias adds to a bias, and this layer has none: the merged model has no place for it", code="GS-3400",
            file=piece.part.file, tensor=path,
            hint="serve the adapter as it is, with PEFT; gora-serve convert --leave-out NAMES drops the tensor",
        )  # fmt: skip
    if len(pieces) > 1 or piece.part.weight != 1 or piece.kind != "replaced":
        raise InputError(
            "a module that the base lacks can be taken from one adapter alone, whole", code="GS-3400",
            file=piece.part.file, tensor=path, actual=f"{len(pieces)} adapters, weight {piece.part.weight:g}",
            hint="give one adapter with weight 1, or a base that has this module",
        )  # fmt: skip
    return True


def _target(base: BaseWeights, name: str, pieces: tuple[Piece, ...], dtype: str, in_4_bits: bool) -> Target:
    entry = base.tensors.entries[name]
    if pieces and entry.dtype not in FLOATS:
        raise InputError(
            "the base is quantized, and its weights are needed as they were", code="GS-3117",
            file=base.tensors.files[name], tensor=name, expected="F32, F16 or BF16", actual=entry.dtype,
            hint="give the base as it was before it was quantized",
        )  # fmt: skip
    module = name.removesuffix(".weight")
    return Target(
        name, _output_dtype(entry.dtype, dtype), _shape(base, name, pieces), name, pieces, module,
        in_4_bits=in_4_bits,
    )  # fmt: skip


def _output_dtype(stored: str, dtype: str) -> str:
    return stored if dtype == "auto" or stored not in FLOATS else DTYPES[getattr(torch, dtype)]


def _shape(base: BaseWeights, name: str, pieces: tuple[Piece, ...]) -> tuple[int, ...]:
    """Return the shape after the merge: the base's, or that of a resized vocabulary."""
    shape = base.tensors.shape(name)
    for piece in pieces:
        new = _new_shape(piece)
        if new is None or new == shape:
            continue
        resized = len(new) == 2 and new[1:] == shape[1:] and name.split(".")[-2] in (*EMBEDDINGS, *HEADS)
        if not resized:
            raise misfit(piece.part.file, name, shape, new)
        if len(pieces) > 1 or piece.part.weight != 1:
            raise InputError(
                "a resized vocabulary can be taken from one adapter alone, with weight 1: its new rows have no base",
                code="GS-3403", file=piece.part.file, tensor=name, expected="one update, weight 1",
                actual=f"{len(pieces)} updates of this tensor" if len(pieces) > 1 else f"weight {piece.part.weight:g}",
                hint="give the adapter with weight 1, and none beside it that updates embeddings or head",
            )  # fmt: skip
        return new
    return shape


def _new_shape(piece: Piece) -> tuple[int, ...] | None:
    if piece.kind == "replaced":
        return tuple(piece.part.replaced[piece.key].shape)
    if piece.kind == "added":
        return tuple(piece.part.added[piece.key].shape)
    ground = piece.part.grounds.get(piece.key)
    return None if ground is None else tuple(ground.shape)


def _untied_head(base: BaseWeights, pieces: tuple[Piece, ...], dtype: str) -> Target:
    source = str(base.find(base.head))
    entry = base.tensors.entries[source]
    shape = _shape(base, source, pieces)
    return Target(
        f"{base.head}.weight", _output_dtype(entry.dtype, dtype), shape, source, pieces, base.head, fresh=True
    )  # fmt: skip


def _fresh(base: BaseWeights, path: str, pieces: tuple[Piece, ...], dtype: str) -> Target:
    tensor = pieces[0].part.replaced[path]
    stored = next((one.dtype for one in base.tensors.entries.values() if one.dtype in FLOATS), "F32")
    kept = stored if tensor.is_floating_point() else CARRIED_DTYPES[tensor.dtype]
    return Target(path, _output_dtype(kept, dtype), tuple(tensor.shape), None, pieces, path, fresh=True)
