"""Whether a model is what a merge would have made: every tensor made again, and held against the one in the files.

The other model may come from any tool: the question is asked element by element, in the type that it has. An edge over
`sums`; nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gora_serve.deploy.base import COMPUTED, FLOATS, BaseWeights
from gora_serve.deploy.blocks import Stored, as_tensor, in_order, opened_tensors, spans, summed_rows
from gora_serve.deploy.merge_values import ModelPlan, Target
from gora_serve.deploy.sum_of import FourBits, sum_of
from gora_serve.deploy.sums import Sum, as_matrix
from gora_serve.deploy.tally import count_differing
from gora_serve.progress import Listener, Progress, silent

Verdict = Literal["exact", "rounded", "differs"]
WORST_FIRST: tuple[Verdict, ...] = ("differs", "rounded", "exact")
SHARE = 0.05  # how much of an update may be missing, or too much, beyond what rounding explains
ROUNDINGS = 3  # of an update's parts that another tool may do: of its factors, and of the product


@dataclass
class Held:
    """One tensor of the model against the one that it should be, added up block by block.

    equal: elements with the same bits. off: those that rounding does not explain. error, update: the norms of theirs
    less the sum, and of the update; ours, theirs: <stored - base, update>, of the sum rounded once and of the tensor in
    the file; size: |sum|^2. eps: of their type. lengths: of DoRA's rows, each rounded, which moves all of its elements.
    why: what is wrong before any element is looked at.
    """

    name: str
    elements: int = 0
    equal: int = 0
    off: int = 0
    max_error: float = 0.0
    squared_update: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    size: float = 0.0
    eps: float = 0.0
    lengths: int = 0
    why: str = ""

    def add(self, other: Held) -> None:
        for name in ("elements", "equal", "off", "squared_update", "ours", "theirs", "size"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_error, self.eps = max(self.max_error, other.max_error), max(self.eps, other.eps)
        self.lengths = max(self.lengths, other.lengths)

    @property
    def share(self) -> float | None:
        """How many times the update is in the tensor; None where there is none."""
        return self.theirs / self.squared_update if self.squared_update else None

    @property
    def verdict(self) -> Verdict:
        if self.why:
            return "differs"
        if self.equal == self.elements:
            return "exact"
        return "rounded" if self.off == 0 and self._has_the_update() else "differs"

    def _has_the_update(self) -> bool:
        """Tell whether the update is there, in sum: an update below the type's steps shows in no single element."""
        if not self.squared_update:
            return True
        update, size = self.squared_update**0.5, self.size**0.5
        noise = self.eps * size / update  # of each rounding, beside the update; many average out
        allowed = SHARE + (noise * min(1, 4 / self.lengths**0.5) if self.lengths else 8 * noise / self.elements**0.5)
        return bool(abs(self.theirs - self.ours) <= allowed * self.squared_update)

    @property
    def reason(self) -> str:
        """Why it differs, in half a sentence."""
        if self.why:
            return self.why
        if self.share is None:
            return "no update belongs here, and it is not the base's"
        if abs(self.share) < SHARE:
            return "the update is not in it"
        should = self.ours / self.squared_update
        if abs(self.share - should) > SHARE:
            rounded = "" if abs(should - 1) < SHARE else f", and rounding leaves {should:.2f}"
            return f"the update is in it {self.share:.2f} times{rounded}"
        return f"{self.off} of {self.elements} elements are off by more than rounding, at most by {self.max_error:.2g}"

    def to_json(self) -> dict[str, Any]:
        value = {"verdict": self.verdict, "elements": self.elements, "equal": self.equal, "off": self.off,
                 "max_error": self.max_error, "update_share": self.share}  # fmt: skip
        return value | ({"reason": self.reason} if self.verdict == "differs" else {})


@dataclass(frozen=True)
class Replay:
    """All tensors, of the merge and of the model, by name."""

    tensors: dict[str, Held] = field(default_factory=dict)

    def of(self, verdict: Verdict) -> list[Held]:
        return [one for one in self.tensors.values() if one.verdict == verdict]

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return next((one for one in WORST_FIRST if self.of(one)), "exact")


@dataclass(frozen=True)
class Job:
    """One block of a target, which is held against `theirs`."""

    target: Target
    theirs: Stored
    source: Stored | None
    total: Sum | None
    start: int
    stop: int

    def run(self) -> Held:
        nbytes, elements = self.theirs.entry.nbytes, max(self.theirs.elements, 1)
        first, last = (index * nbytes // elements for index in (self.start, self.stop))  # some types have 4 or 6 bits
        data = self.theirs.read(first, last)
        if self.total is None and self.source is not None and self.source.entry.dtype == self.theirs.entry.dtype:
            same = data == self.source.read(first, last)
            count = self.stop - self.start
            return Held(self.target.name, count, count if same else 0, 0 if same else count)
        return _held(self, as_tensor(data, self.theirs.entry.dtype))


def replay(
    merged: BaseWeights, base: BaseWeights, plan: ModelPlan, *, four_bits: FourBits | None = None,
    listen: Listener = silent,
) -> Replay:  # fmt: skip
    """Hold every tensor of a model against the plan of a merge. Raises what `sum_of` does."""
    found = Replay()
    pairs = list(_pairs(merged, base, plan, found))
    with ExitStack() as stack:
        ours, theirs = (opened_tensors(stack, one.folder) for one in (base, merged))
        total, done = sum(theirs[name].entry.nbytes for _, name in pairs), 0
        jobs = (job for target, name in pairs for job in _jobs(base, target, ours, theirs[name], four_bits))
        for job, held in in_order(jobs, Job.run):
            found.tensors.setdefault(job.target.name, Held(job.target.name)).add(held)
            done += (job.stop - job.start) * job.theirs.entry.nbytes // max(job.theirs.elements, 1)
            listen(Progress("replay", done, total, in_bytes=True))
    return found


def _pairs(merged: BaseWeights, base: BaseWeights, plan: ModelPlan, found: Replay) -> Iterator[tuple[Target, str]]:
    """Yield each target with the model's name for it; note what is missing, extra, of another form, or not in use."""
    used = set()
    needs_head = not _classifies(base, plan)
    is_tied = bool(merged.config.get("tie_word_embeddings", True))
    unties = _unties(base, plan)
    if needs_head and _lost_tie(merged, base, plan):
        why = "config.json does not tie the head to the embeddings, and the model has none of its own"
        found.tensors[f"{base.head}.weight"] = Held(f"{base.head}.weight", why=why)
    for target in plan.targets:
        name = merged.find_parameter(target.name) or (
            merged.find(target.module) if target.name.endswith(".weight") else None
        )
        if name is None:
            if not COMPUTED.search(target.name) and (needs_head or not base.is_head(target.module)):
                found.tensors[target.name] = Held(target.name, why="the model lacks it")
            continue
        used.add(name)
        entry = merged.tensors.entries[name]
        if entry.shape != target.shape:
            why = f"its shape is {entry.shape}, and should be {target.shape}"
        elif entry.dtype != target.dtype and not {entry.dtype, target.dtype} <= set(FLOATS):
            why = f"its type is {entry.dtype}, and should be {target.dtype}"
        elif is_tied and (target.fresh or unties) and base.is_head(target.module):
            lost = "the head's own update is lost" if target.pieces else "it gets their update, and none belongs there"
            why = f"config.json ties the head to the embeddings, so that {lost}"
        else:
            yield replace(target, dtype=entry.dtype), name
            continue
        found.tensors[target.name] = Held(target.name, why=why)
    tied = {target.module: target for target in plan.targets}
    for name in merged.tensors:
        if name in used or COMPUTED.search(name):
            continue
        source = _embeddings_of(name, merged, tied)
        if source is None:
            found.tensors[name] = Held(name, why="the merge knows no such tensor")
        else:
            yield replace(source, name=name, dtype=merged.tensors.entries[name].dtype), name


def _classifies(base: BaseWeights, plan: ModelPlan) -> bool:
    """Whether a classifier takes the place of the head that makes tokens, which other tools then leave out."""
    pieces = [piece for one in plan.targets if one.fresh and not base.is_head(one.module) for piece in one.pieces]
    return any(piece.part.task_type == "SEQ_CLS" for piece in pieces)


def _unties(base: BaseWeights, plan: ModelPlan) -> bool:
    """Whether the merge parts the head from the embeddings, of which it may have a copy already."""
    tied = base.config.get("tie_word_embeddings", True)
    return bool(tied) and plan.config is not None and plan.config.get("tie_word_embeddings") is False


def _lost_tie(merged: BaseWeights, base: BaseWeights, plan: ModelPlan) -> bool:
    """Whether a head that was tied, and should be so still, reads nothing."""
    if base.is_bare or any(one.fresh and base.is_head(one.module) for one in plan.targets):
        return False
    tied = any(base.feeds_head(one.module) for one in plan.targets if base.is_embedding(one.module))
    return tied and merged.find(base.head) is None


def _embeddings_of(name: str, merged: BaseWeights, targets: dict[str, Target]) -> Target | None:
    """Return the target that a head stands for which another tool has written out, though the model ties it."""
    path = name.removesuffix(".weight")
    if not merged.is_head(path):
        return None
    return next((one for module, one in targets.items() if merged.is_embedding(module) and not one.fresh), None)


def _jobs(
    base: BaseWeights, target: Target, places: dict[str, Stored], theirs: Stored, four_bits: FourBits | None
) -> Iterator[Job]:
    source = places[target.source] if target.source is not None else None
    total = sum_of(base, target, four_bits)
    if source is not None and source.entry.shape != target.shape:
        source = None
    sizes = [max(1, one.entry.nbytes // max(one.elements, 1)) for one in (theirs, source) if one is not None]
    for start, stop in spans(theirs.elements, *sizes):
        yield Job(target, theirs, source, total, start, stop)


def _held(job: Job, theirs: Tensor) -> Held:
    held = Held(job.target.name, eps=torch.finfo(theirs.dtype).eps)
    total = job.total or Sum(as_matrix(job.target.shape), (), torch.float64)
    for row, end, W, inside, place, _ in summed_rows(job.source, total, job.start, job.stop):
        exact = total.rows(row, end, W)
        _compare(held, total, (row, end), W, exact, inside, theirs[place])
    held.lengths = total.lengths
    return held


def _compare(
    held: Held, total: Sum, rows: tuple[int, int], W: Tensor, exact: Tensor, inside: slice, theirs: Tensor
) -> None:
    """Add some rows of a tensor: W, exact and update are (rows, columns), `theirs` the elements of them in `inside`."""
    value, base = exact.view(-1)[inside], W.reshape(-1)[inside]
    ours = value.to(theirs.dtype)
    update, found = value - base, theirs.to(value.dtype)
    error = (found - value).abs()
    held.elements += theirs.numel()
    unlike = count_differing(ours, theirs)
    held.equal += theirs.numel() - unlike
    held.max_error = max(held.max_error, float(error.max()) if error.numel() else 0.0)
    held.squared_update += float(update.dot(update))
    held.ours += float((ours.to(value.dtype) - base).dot(update))
    held.theirs += float((found - base).dot(update))
    held.size += float(value.dot(value))
    if total.is_plain:
        held.off += unlike
        return
    finfo = torch.finfo(theirs.dtype)
    floor = 4 * finfo.smallest_normal * finfo.eps  # steps of the numbers below the smallest normal one
    near = error <= finfo.eps * value.abs() + floor
    if not near.all():
        spread = total.spread(*rows, W).view(-1)[inside]
        loose = finfo.eps * (value.abs() + ROUNDINGS * spread) + _sums(total) * spread + floor
        near = error <= loose  # NaN is not
    held.off += int((~near).sum())


def _sums(total: Sum) -> float:
    """What adding up in float32 may cost, of the absolute values: one rounding for each of the added products."""
    ranks = [term.A.shape[-2] for term in total.terms if hasattr(term, "A")]
    return float(torch.finfo(torch.float32).eps * sum(ranks))
