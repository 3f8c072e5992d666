"""What becomes of each tensor of a base when adapters are merged into it: names and headers, no weights are read.

Tensors that several modules share (a head tied to the embeddings, the halves of an encoder-decoder) stay shared where
all of them get the same update. A head that does not is given a tensor of its own; where the model cannot have that,
the merge is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.format import CARRIED_DTYPES, DTYPES
from gora_serve.deploy.base import EMBEDDINGS, FLOATS, HALVES, HEADS, MODEL_HEAD, SHARED, BaseWeights, misfit
from gora_serve.errors import BindingError, InputError
from gora_serve.integrity.headers import tensor_nbytes

Kind = Literal["module", "magnitude", "replaced", "added", "stack"]
TORCH = {name: dtype for dtype, name in CARRIED_DTYPES.items()}


@dataclass(frozen=True)
class Experts:
    """The update of a fused parameter: A (E, r, in) and B (E, out, r), for experts stored as (out, in), or turned."""

    A: Tensor
    B: Tensor
    turned: bool


@dataclass(frozen=True)
class Part:
    """One adapter as merging takes it: everything by the model's own paths, read when it is asked for.

    modules: the exact update on the untouched base. magnitudes: DoRA's, of modules whose factors are then those before
    rescaling. replaced: parameter path -> the tensor in the base's place. added: parameter path -> what is added to it.
    stacks: fused parameter -> the experts' updates. grounds: module path -> the whole embeddings that an adapter of a
    resized vocabulary was trained over. file: for messages.
    """

    weight: float
    modules: Mapping[str, LoraFactors]
    file: Path
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    stacks: Mapping[str, Experts] = field(default_factory=dict)
    grounds: Mapping[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None


@dataclass(frozen=True)
class Piece:
    """What one adapter adds to one tensor."""

    part: Part
    kind: Kind
    key: str


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model.

    source: the base's tensor that it starts from, None for a new one. module: the path that shapes and receipts go by.
    fresh: it has no place in the base's files: a head that is untied, a classifier. in_4_bits: it lay so in training.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    pieces: tuple[Piece, ...] = ()
    module: str = ""
    fresh: bool = False
    in_4_bits: bool = False

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.name, self.dtype, self.shape)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelPlan:
    """All tensors: in the base's order, then the fresh ones. config: keys of config.json that change, or None where
    it is kept as it is. notes: what a person should know."""

    targets: tuple[Target, ...]
    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def plan_merge(base: BaseWeights, parts: Sequence[Part], dtype: str, *, in_4_bits: Sequence[str] = ()) -> ModelPlan:
    """Decide about every tensor. dtype: "auto", or of all floating-point tensors. in_4_bits: the modules that lay so in
    training.

    Raises BindingError: GS-404 a module that the base lacks, GS-405 another shape, GS-4400 modules that share a tensor
    and are not updated alike, GS-4401 vocabularies that do not agree. InputError: GS-3117 a quantized base, GS-3400 a
    module replaced whole that the base lacks, by several adapters or in part.
    """
    by_path = _pieces(base, parts)
    shared, untied = _share(base, by_path)
    fours = {base.find(path) for path in in_4_bits}
    targets = [_target(base, name, shared.get(name, ()), dtype, name in fours) for name in base.tensors]
    if untied is not None:
        targets.append(_untied_head(base, targets, untied, dtype))
    targets += [_fresh(base, path, pieces, dtype) for path, pieces in by_path.items() if _lacks(base, path, pieces)]
    _check_vocabulary(base, targets)
    config, notes = _config(base, parts, targets, dtype, untied=untied is not None)
    return ModelPlan(tuple(targets), config, tuple(notes))


Pieces = dict[str, tuple[Piece, ...]]  # module path, or parameter path -> what is added there


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
    piece = pieces[0]
    if len(pieces) > 1 or piece.part.weight != 1 or piece.kind != "replaced":
        raise InputError(
            "a module that the base lacks can be taken from one adapter alone, whole", code="GS-3400",
            file=piece.part.file, tensor=path, actual=f"{len(pieces)} adapters, weight {piece.part.weight:g}",
            hint="give one adapter with weight 1, or a base that has this module",
        )  # fmt: skip
    return True


def _share(base: BaseWeights, by_path: Pieces) -> tuple[Pieces, tuple[Piece, ...] | None]:
    """Return the pieces by the base's tensor, and those of a head that has to be untied (None: it stays tied)."""
    shared: Pieces = {}
    owners: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for path, pieces in by_path.items():
        name = base.counterpart(path)
        if name is not None:
            owners.setdefault(name, {})[path] = pieces
    untied = None
    for name, updates in owners.items():
        users = _users(base, name, updates)
        alike = all(_alike(updates.get(user, ()), next(iter(updates.values()))) for user in users)
        if alike:
            shared[name] = next(iter(updates.values()))
            continue
        head = next((user for user in users if user.removesuffix(".weight") == MODEL_HEAD), None)
        rest = {user: updates.get(user, ()) for user in users if user != head}
        if head is None or not _can_untie(base) or not _all_alike(list(rest.values())):
            raise _refuse_shared(base, name, updates, users)
        shared[name] = next(iter(rest.values()), ())
        untied = updates.get(head) or _resized_head(shared[name])
    return shared, untied


def _resized_head(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return what a head starts from that was tied to embeddings of a resized vocabulary; () where they are not."""
    grounds = [piece.part.grounds[piece.key] for piece in pieces if piece.key in piece.part.grounds]
    path = f"{MODEL_HEAD}.weight"
    return tuple(
        Piece(Part(1.0, {}, pieces[0].part.file, replaced={path: ground}), "replaced", path) for ground in grounds[:1]
    )


def _users(base: BaseWeights, name: str, updated: Iterable[str]) -> dict[str, None]:
    """Return the weights, by parameter path, that the model reads from this tensor: all, and those that are updated."""
    path = name.removesuffix(".weight")
    users = dict.fromkeys(updated)
    if not base.is_embedding(path):
        return users
    others = [f"{path.removesuffix(SHARED)}{half}" for half in HALVES] if path.endswith(SHARED) else []
    others = [other for other in others if base.find(other) == name]
    others += [MODEL_HEAD] if base.is_tied(MODEL_HEAD, path) else []
    others = [f"{other}.weight" for other in others]
    own = [user for user in users if user not in others] or [f"{path}.weight"]
    return dict.fromkeys([*own, *others]) if others else users


def _can_untie(base: BaseWeights) -> bool:
    """Encoder-decoders scale what a tied head reads, or tie it whatever their configuration says."""
    return not base.config.get("is_encoder_decoder", False)


def _all_alike(updates: Sequence[tuple[Piece, ...]]) -> bool:
    return all(_alike(one, updates[0]) for one in updates)


def _alike(one: tuple[Piece, ...], other: tuple[Piece, ...]) -> bool:
    """Tell whether two lists of pieces add the same."""
    return len(one) == len(other) and all(_same_piece(a, b) for a, b in zip(one, other, strict=True))


def _same_piece(one: Piece, other: Piece) -> bool:
    if one == other:
        return True
    if one.part is not other.part or one.kind != other.kind:
        return False
    if one.kind == "module":
        a, b = one.part.modules[one.key], one.part.modules[other.key]
        return a.scale == b.scale and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
    return one.kind == "replaced" and torch.equal(one.part.replaced[one.key], one.part.replaced[other.key])


def _refuse_shared(
    base: BaseWeights, name: str, updates: Mapping[str, tuple[Piece, ...]], users: Mapping[str, None]
) -> BindingError:
    file = next(iter(updates.values()))[0].part.file
    return BindingError(
        "modules that share one tensor are not updated alike, and this model cannot part them", code="GS-4400",
        file=file, tensor=name, expected=f"one update for {', '.join(users)}",
        actual=f"updates of {', '.join(updates)}",
        hint="serve the adapter as it is; or train without the embeddings and the head",
    )  # fmt: skip


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
        if not resized or len(pieces) > 1 or piece.part.weight != 1:
            raise misfit(piece.part.file, name, shape, new)
        return new
    return shape


def _new_shape(piece: Piece) -> tuple[int, ...] | None:
    if piece.kind == "replaced":
        return tuple(piece.part.replaced[piece.key].shape)
    if piece.kind == "added":
        return tuple(piece.part.added[piece.key].shape)
    ground = piece.part.grounds.get(piece.key)
    return None if ground is None else tuple(ground.shape)


def _untied_head(base: BaseWeights, targets: list[Target], pieces: tuple[Piece, ...], dtype: str) -> Target:
    source = str(base.find(MODEL_HEAD))
    entry = base.tensors.entries[source]
    shape = _shape(base, source, pieces)
    return Target(
        f"{MODEL_HEAD}.weight", _output_dtype(entry.dtype, dtype), shape, source, pieces, MODEL_HEAD, fresh=True
    )  # fmt: skip


def _fresh(base: BaseWeights, path: str, pieces: tuple[Piece, ...], dtype: str) -> Target:
    tensor = pieces[0].part.replaced[path]
    stored = next((one.dtype for one in base.tensors.entries.values() if one.dtype in FLOATS), "F32")
    kept = stored if tensor.is_floating_point() else CARRIED_DTYPES[tensor.dtype]
    return Target(path, _output_dtype(kept, dtype), tuple(tensor.shape), None, pieces, path, fresh=True)


def _vocabularies(targets: Sequence[Target]) -> Iterator[Target]:
    for target in targets:
        if target.name.endswith(".weight") and target.name.split(".")[-2] in (*EMBEDDINGS, *HEADS):
            yield target


def _check_vocabulary(base: BaseWeights, targets: Sequence[Target]) -> None:
    """Raise BindingError (GS-4401) where embeddings and head end up with other numbers of tokens, unlike the base's."""
    before = {one.source: base.tensors.shape(one.source)[0] for one in _vocabularies(targets) if one.source}
    after = {one.name: one.shape[0] for one in _vocabularies(targets)}
    resized = {one.name for one in _vocabularies(targets) if one.source and one.shape[0] != before[one.source]}
    if resized and len(set(after.values())) > 1:
        raise BindingError(
            "the adapter resizes the vocabulary of one module and not of the other", code="GS-4401",
            file=base.folder, tensor=min(resized), actual=", ".join(f"{name} {rows}" for name, rows in after.items()),
            hint="save the adapter with both, embeddings and head (save_embedding_layers=True)",
        )  # fmt: skip


def _config(
    base: BaseWeights, parts: Sequence[Part], targets: Sequence[Target], dtype: str, *, untied: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the new config.json, None where it stays as it is, and notes on what changed."""
    config, notes = dict(base.config), []
    if untied:
        config = _everywhere(config, "tie_word_embeddings", False)
        notes.append("the head was tied to the embeddings and gets another update: it has a tensor of its own now")
    rows = next((one.shape[0] for one in _vocabularies(targets) if one.source and one.shape != base.tensors.shape(
        one.source)), None)  # fmt: skip
    if rows is not None:
        config = _everywhere(config, "vocab_size", rows)
        notes.append(f"the vocabulary has {rows} tokens now: embeddings and tokenizer must be of one run")
    if dtype != "auto":
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config = _everywhere(config, key, dtype)
    config = _classifier(config, parts, targets)
    return (config if config != base.config else None), notes


def _everywhere(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key at the top, and in the text model's own part where that is another object and has it."""
    text = config.get("text_config")
    inner = {"text_config": {**text, key: value}} if isinstance(text, dict) and key in text else {}
    return {**config, **inner} if inner and key not in config else {**config, **inner, key: value}


def _classifier(config: dict[str, Any], parts: Sequence[Part], targets: Sequence[Target]) -> dict[str, Any]:
    """Name as many labels as a new classifier has rows, and the model after it."""
    heads = [one for one in targets if one.fresh and one.name.endswith(("score.weight", "classifier.weight"))]
    if not heads or not any(part.task_type == "SEQ_CLS" for part in parts):
        return config
    rows = heads[0].shape[0]
    if len(config.get("id2label") or {}) != rows:
        labels = {str(index): f"LABEL_{index}" for index in range(rows)}
        config = config | {"id2label": labels, "label2id": {name: int(index) for index, name in labels.items()}}
    names = config.get("architectures") or []
    renamed = [name.replace("ForCausalLM", "ForSequenceClassification") for name in names]
    return config | ({"architectures": renamed} if names else {})
