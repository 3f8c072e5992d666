"""What a family's reader gets, and what it gives back. Every `converters/<family>.py` has one `read(source, inputs)`.

A reader turns a foreign checkpoint into an `Adapter` on the untouched base, exactly: a sum of thin factors where the
family is low-rank, factors of full rank where it is not. It works on files and headers; factors are computed when a
module is asked for. Recompression, truncation, rounding and writing come later and are the same for all families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gora_serve.adapter.factors import Adapter, LoraFactors
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.merge_values import Experts
from gora_serve.errors import UsageError
from gora_serve.progress import Listener, silent


@dataclass(frozen=True)
class Inputs:
    """What `convert` and `gap` may be given beside the adapter itself.

    base: the untouched base. init_adapter: the adapter as it was right after initialisation. mutated_base: the base
    that the initialisation edited. cache: CorDA's cache file. pickles: whether .bin and .pt files may be opened
    (weights only). leave_out: regular expressions (parts of names do) for tensors that the output cannot hold, and that
    are dropped; carry: of a fully fine-tuned model, for the modules that are kept whole as modules_to_save. merging:
    the output is a whole model, which can hold what an adapter cannot: biases, another vocabulary, fused experts.
    """

    base: BaseWeights | None = None
    init_adapter: Path | None = None
    mutated_base: Path | None = None
    cache: Path | None = None
    pickles: bool = False
    listen: Listener = silent
    leave_out: tuple[str, ...] = ()
    carry: tuple[str, ...] = ()
    merging: bool = False

    @property
    def beside(self) -> list[Path]:
        """What is read beside the adapter and the base, and no output may replace."""
        return [path for path in (self.init_adapter, self.mutated_base, self.cache) if path is not None]

    def need_base(self, why: str) -> BaseWeights:
        """Return the base. Raises UsageError (GS-230) that says what it is needed for."""
        if self.base is None:
            raise UsageError(f"{why} needs the untouched base", code="GS-230", hint="--base BASE")
        return self.base


@dataclass(frozen=True)
class Beyond:
    """What a merged model alone can hold: of `Reading.lost`, and what the factors alone do not say.

    replaced: parameter path -> tensor name of a weight or bias that was trained whole. added: bias -> (tensor name, the
    scale of what it adds). magnitudes: DoRA's, module path -> tensor name. before: the factors of these modules before
    they are rescaled. stacks: fused parameter -> the update of all its experts. grounds: module path -> tensor name of
    the embeddings of a resized vocabulary, which the factors were trained over. sizes: of a family that multiplies the
    base's weight, module path -> the absolute values that are added up to the update, (out, in): rounding goes by them.
    """

    replaced: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    magnitudes: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, LoraFactors] = field(default_factory=dict)
    stacks: Mapping[str, Experts] = field(default_factory=dict)
    grounds: Mapping[str, str] = field(default_factory=dict)
    sizes: Callable[[str], Tensor] | None = None

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors that are among those lost to an adapter."""
        added = {name for name, _ in self.added.values()}
        return frozenset({*self.replaced.values(), *added, *self.grounds.values()})


@dataclass(frozen=True)
class Reading:
    """A foreign checkpoint, understood.

    adapter: the update on the untouched base, exact, read module by module.
    applied: names of the input's tensors that went into `adapter.modules`; carried: those that went into
        `adapter.carried`; known: those that add nothing, each with the reason (a copy of the base's own embeddings).
        lost: those that the output cannot hold, each with the reason; the user may leave them out. Together they are
        all of them.
    served: what an engine that serves LoRA would add to the base if it were given the checkpoint as it is; None where
        none loads it (DoRA, LoHa and the like, which PEFT alone loads; whole modules, trained tokens, large ranks).
    initial: P0, what the initialisation took out of the base; None for a family that leaves the base alone.
    edited: W_res itself, as it was saved; None where it is not at hand.
    beyond: what only a merged model holds.
    full_rank: the update is not low-rank (DoRA, a full fine-tune): it can be had only truncated.
    method: how the initial update was found, or how the family's maths was applied, in one line for the receipt.
    files: what else was read, for the receipt: files, or folders of an adapter or a model.
    notes: what a person should know, one sentence each.
    """

    adapter: Adapter
    applied: frozenset[str]
    carried: frozenset[str] = frozenset()
    known: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    served: Mapping[str, LoraFactors] | None = None
    initial: Mapping[str, LoraFactors] | None = None
    edited: BaseWeights | None = None
    beyond: Beyond = field(default_factory=Beyond)
    full_rank: bool = False
    method: str = ""
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
