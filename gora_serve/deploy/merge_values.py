"""The values of a merge into a model: adapters as it takes them, what they add where, the tensors that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.format import CARRIED_DTYPES
from gora_serve.integrity.headers import tensor_nbytes

Kind = Literal["module", "magnitude", "replaced", "added", "stack"]
TORCH = {name: dtype for dtype, name in CARRIED_DTYPES.items()}


@dataclass(frozen=True)
class Experts:
    """The update of a fused parameter: A (E, r, in) and B (E, out, r), for experts stored as (out, in), or turned."""

    A: Tensor
    B: Tensor
    turned: bool


@dataclass(frozen=True, eq=False)  # equal is the same: tensors have no truth in comparison
class Part:
    """One adapter as merging takes it: everything by the model's own paths, read when it is asked for.

    modules: the exact update on the untouched base. magnitudes: DoRA's, of modules whose factors are then those before
    rescaling. replaced: parameter path -> the tensor in the base's place. added: parameter path -> what is added to it.
    stacks: fused parameter -> the experts' updates. grounds: module path -> the whole embeddings that an adapter of a
    resized vocabulary was trained over. sizes: module path -> the absolute values that are added up to its update,
    (out, in), where the factors do not say. embeddings: the modules that are. file: for messages.
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
    sizes: Callable[[str], Tensor] | None = None
    embeddings: frozenset[str] = frozenset()


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


Pieces = dict[str, tuple[Piece, ...]]  # module path, or parameter path -> what is added there
