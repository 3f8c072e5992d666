"""Tensors that several modules share, when adapters are merged: a head tied to the embeddings, halves of an
encoder-decoder. They stay shared where all of them get the same update. A head that does not is given a tensor of its
own, or keeps the copy that it has; where the model cannot have that, the merge is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from gora_serve.deploy.base import HALVES, SHARED, BaseWeights
from gora_serve.deploy.merge_values import Part, Piece, Pieces
from gora_serve.errors import BindingError

HEADLESS_TASKS = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"}  # of PEFT's task types


def share_out(base: BaseWeights, by_path: Pieces) -> tuple[Pieces, tuple[Piece, ...] | None]:
    """Return the pieces by the base's tensor, and those of a head that has to be untied (None: it stays tied)."""
    shared: Pieces = {}
    owners: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for path, pieces in by_path.items():
        name = base.counterpart(path)
        if name is not None:
            owners.setdefault(name, {})[path] = pieces
    untied = None
    for name, updates in owners.items():
        headless = _is_headless(base, updates)
        if not headless and _is_embedding(base, name, updates) and base.ties_head and base.find(base.head) is None:
            raise _refuse_shared(name, updates, [*updates, "a head that is tied to it, if there is one"])
        users = _users(base, name, updates)
        if headless and not _can_untie(base, name):
            users.pop(f"{base.head}.weight", None)
        alike = all(_alike(updates.get(user, ()), next(iter(updates.values()))) for user in users)
        if alike:
            shared[name] = next(iter(updates.values()))
            continue
        head = next((user for user in users if user == f"{base.head}.weight"), None)
        rest = {user: updates.get(user, ()) for user in users if user != head}
        if head is None or not _can_untie(base, name) or not _all_alike(list(rest.values())):
            raise _refuse_shared(name, updates, users)
        shared[name] = next(iter(rest.values()), ())
        untied = updates.get(head) or _resized_head(base, shared[name])
    return shared, untied


def parts_copy(base: BaseWeights, by_path: Pieces) -> bool:
    """Tell whether a head whose tensor is a copy of the embeddings it is tied to gets another update than they do.

    Raises BindingError (GS-4400) where this model cannot have two that differ.
    """
    shared = {f"{base.head}.weight", *(path for path in by_path if base.is_embedding(path.removesuffix(".weight")))}
    if not shared & by_path.keys() or base.copied_to_head is None:
        return False
    updates = {path: by_path[path] for path in shared & by_path.keys()}
    of_embeddings = [one for path, one in updates.items() if base.counterpart(path) == base.copied_to_head]
    if _is_headless(base, updates) or _alike(updates.get(f"{base.head}.weight", ()), next(iter(of_embeddings), ())):
        return False
    if not _can_untie(base, base.copied_to_head):
        raise _refuse_shared(base.copied_to_head, updates, sorted(shared))
    return True


def _resized_head(base: BaseWeights, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return what a head starts from that was tied to embeddings of a resized vocabulary; () where they are not."""
    grounds = [piece.part.grounds[piece.key] for piece in pieces if piece.key in piece.part.grounds]
    path = f"{base.head}.weight"
    return tuple(
        Piece(Part(1.0, {}, pieces[0].part.file, replaced={path: ground}), "replaced", path) for ground in grounds[:1]
    )


def _is_headless(base: BaseWeights, updates: Pieces) -> bool:
    """Tell whether no head makes tokens of what these adapters train: by their task, or as the base has none."""
    tasks = {piece.part.task_type for pieces in updates.values() for piece in pieces}
    return bool(tasks & HEADLESS_TASKS) or (base.is_trunk and "CAUSAL_LM" not in tasks)


def _is_embedding(base: BaseWeights, name: str, updates: Pieces) -> bool:
    """Tell whether a tensor is of embeddings: by its name, by its rows, or as an adapter has it."""
    trained = any(piece.key in piece.part.embeddings for pieces in updates.values() for piece in pieces)
    rows = base.tensors.shape(name)[:1]
    return trained or base.is_embedding(name.removesuffix(".weight")) or rows == (base.config.get("vocab_size"),)


def _users(base: BaseWeights, name: str, updated: Iterable[str]) -> dict[str, None]:
    """Return the weights, by parameter path, that the model reads from this tensor: all, and those that are updated."""
    path = name.removesuffix(".weight")
    users = dict.fromkeys(updated)
    if not base.is_embedding(path):
        return users
    others = [f"{path.removesuffix(SHARED)}{half}" for half in HALVES] if path.endswith(SHARED) else []
    others = [other for other in others if base.find(other) == name]
    others += [base.head] if base.feeds_head(path) else []
    others = [f"{other}.weight" for other in others]
    own = [user for user in users if user not in others] or [f"{path}.weight"]
    return dict.fromkeys([*own, *others]) if others else users


def _can_untie(base: BaseWeights, name: str) -> bool:
    """Encoder-decoders scale what a tied head reads, or tie it whatever their configuration says; BERT's kin, whose
    embeddings lie in a module `embeddings`, tie the head's bias too."""
    return not base.config.get("is_encoder_decoder", False) and name.split(".")[-3:-2] != ["embeddings"]


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


def _refuse_shared(name: str, updates: Mapping[str, tuple[Piece, ...]], users: Iterable[str]) -> BindingError:
    file = next(iter(updates.values()))[0].part.file
    return BindingError(
        "modules that share one tensor are not updated alike, and this model cannot part them", code="GS-4400",
        file=file, tensor=name, expected=f"one update for {', '.join(users)}",
        actual=f"updates of {', '.join(updates)}",
        hint="serve the adapter as it is; or train without the embeddings and the head",
    )  # fmt: skip
