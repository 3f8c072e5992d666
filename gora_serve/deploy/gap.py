"""The training/inference gap of an adapter, in numbers: how wrong it is where it is served as it is, what no adapter
can hold, and what rounding costs. Mappings of factors and a base in, frozen values out; one module in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import compress, distance, norm, subtract
from gora_serve.deploy.base import EMBEDDINGS, HEADS, BaseWeights
from gora_serve.deploy.update import LARGEST, check_update
from gora_serve.errors import InputError
from gora_serve.progress import Listener, Progress, silent

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK = 2**22  # values of a weight in float64 at a time: 32 MiB

Factors = Mapping[str, LoraFactors]
Requantize = Callable[[Tensor], Tensor]  # a weight, (out, in) -> the same, rounded to 4 bits, in float32


@dataclass(frozen=True)
class ModuleGap:
    """One module. All but shape and ranks are Frobenius norms; None where the question does not arise.

    weight: |W0|. update: |dW|, the exact update on W0. initial: |P0|, what the initialisation took out of the base.
    unconverted: |served - dW|, the error where an engine applies the adapter as it is; None: no engine loads it.
    base_rounding: |W_res - (W0 - P0)|, full rank, which no adapter can hold (and what A0 and B0 lost, where P0 is an
    initial adapter: on a base in 16 bits PEFT rounds them after it has made W_res). stored: the error of dW
    compressed, then rounded; rank: its rank. stored_plain: that of the exact factors rounded as they are, at the rank
    `plain_rank` (2r where P0 is concatenated). Both are None for an update of full rank, whose ranks are 0: it can be
    stored only truncated. quantized: |W0 - W_4bit|.
    """

    shape: tuple[int, int]
    weight: float
    update: float
    unconverted: float | None
    initial: float | None
    base_rounding: float | None
    stored: float | None
    stored_plain: float | None
    quantized: float | None
    rank: int
    plain_rank: int
    served_rank: int

    @property
    def parameters(self) -> int:
        """Of an adapter of rank 1."""
        return sum(self.shape)


NORMS = ("weight", "update", "unconverted", "initial", "base_rounding", "stored", "stored_plain", "quantized")
SHARES: Mapping[str, tuple[str, str]] = {  # name -> part, whole
    "initial_of_weight": ("initial", "weight"),
    "unconverted_of_weight": ("unconverted", "weight"),
    "unconverted_of_update": ("unconverted", "update"),
    "base_rounding_of_weight": ("base_rounding", "weight"),
    "base_rounding_of_update": ("base_rounding", "update"),
    "stored_of_update": ("stored", "update"),
    "stored_plain_of_update": ("stored_plain", "update"),
    "quantized_of_weight": ("quantized", "weight"),
    "quantized_of_update": ("quantized", "update"),
}


@dataclass(frozen=True)
class Gap:
    """All modules. loads: whether any engine would take the adapter as it is. estimated: whether base_rounding is what
    the dtype of training makes likely, and not measured on the edited base itself."""

    modules: Mapping[str, ModuleGap]
    loads: bool
    estimated: bool = False

    def norms(self, paths: Iterable[str] | None = None) -> dict[str, float | None]:
        """Return each of NORMS over these modules together (all of them where none are named)."""
        chosen = list(self.modules if paths is None else paths)
        return {name: _together([getattr(self.modules[path], name) for path in chosen]) for name in NORMS}

    def shares(self, paths: Iterable[str] | None = None) -> dict[str, float | None]:
        """Return each of SHARES over these modules together, those left out that have no such part.

        None where the part is unknown, or where the whole is zero and the part is not.
        """
        chosen = [self.modules[path] for path in (self.modules if paths is None else paths)]
        found = {}
        for name, (part, whole) in SHARES.items():
            having = [module for module in chosen if getattr(module, part) is not None]
            found[name] = _share(*(_together([getattr(module, one) for module in having]) for one in (part, whole)))
        return found

    def within(self, threshold: float) -> bool:
        """Return whether the adapter may be served as it is: it loads, and |served - dW| <= threshold * |dW|."""
        error = self.shares()["unconverted_of_update"]
        return self.loads and error is not None and error <= threshold


def _together(values: Iterable[float | None]) -> float | None:
    """Return the root of the sum of squares of those that are known."""
    known = [value for value in values if value is not None]
    return math.sqrt(math.fsum(value**2 for value in known)) if known else None


def _share(part: float | None, whole: float | None) -> float | None:
    if part is None or whole is None or (whole == 0 and part != 0):
        return None
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class Parts:
    """What is compared. exact: the update on the untouched base. served: what an engine would add to it, None where
    none loads the adapter. initial: P0, None where the base was left alone. mutated: the edited base that was trained
    on, where it is at hand; else it is taken to be W0 - P0 in `dtype` (None: the one that W0 is stored in). requantize:
    rounds a weight to 4 bits, for an adapter that was trained on such a base. full_rank: exact is not low-rank.
    file: where the factors come from, for messages.
    """

    base: BaseWeights
    exact: Factors
    served: Factors | None = None
    initial: Factors | None = None
    mutated: BaseWeights | None = None
    requantize: Requantize | None = None
    dtype: torch.dtype | None = None
    full_rank: bool = False
    file: Path | None = None

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys([*self.exact, *(self.served or {}), *(self.initial or {})]))

    def of(self, path: str) -> tuple[LoraFactors | None, LoraFactors | None, LoraFactors | None]:
        """Return exact, served and initial of a module, None where there is none."""
        exact, served, initial = (one.get(path) if one else None for one in (self.exact, self.served, self.initial))
        return exact, served, initial

    def trained_on(self, path: str, weight: Tensor) -> Tensor:
        """Return the weight of `path` in training, (out, in), given W0: W_res, in 4 bits where it was, or W0 itself."""
        if self.mutated is not None:
            return self._mutated(self.mutated, path, weight)
        weight = weight.to(self.dtype or weight.dtype)
        if self.initial is not None and path in self.initial:
            taken = self.initial[path]
            weight = torch.cat([(block - part).to(weight.dtype) for block, part in _blocks(weight, taken)])
        if self.requantize is not None and is_quantizable(path):
            return self.requantize(weight)
        return weight

    def _mutated(self, mutated: BaseWeights, path: str, weight: Tensor) -> Tensor:
        found = mutated.weight(path)
        if found.shape != weight.shape:
            raise InputError(
                "the mutated base has another shape than the base", code="GS-3190", file=mutated.folder, tensor=path,
                expected=tuple(weight.shape), actual=tuple(found.shape), hint="give the base that was trained on",
            )  # fmt: skip
        return found


def measure_gap(parts: Parts, dtype: torch.dtype, *, tolerance: float = 0.0, listen: Listener = silent) -> Gap:
    """Measure every module. dtype: what the factors are stored in. tolerance: of `compress`, as in conversion.

    Raises BindingError for a module that the base lacks (GS-404) or has in another shape (GS-405), InputError for a
    mutated base of another shape (GS-3190) and for numbers beyond all arithmetic (GS-3105, GS-3142).
    """
    modules = {}
    for index, path in enumerate(parts.paths):
        modules[path] = _measure(parts, path, dtype, tolerance)
        listen(Progress("gap", index + 1, len(parts.paths)))
    return Gap(modules, parts.served is not None, parts.mutated is None)


def _measure(parts: Parts, path: str, dtype: torch.dtype, tolerance: float) -> ModuleGap:
    weight = parts.base.weight(path)  # (out, in)
    size = block_norm(weight)
    if not size < LARGEST:
        raise InputError(
            "the base's weight is too large for any arithmetic", code="GS-3142", file=parts.base.folder, tensor=path,
            hint="fetch the base again",
        )  # fmt: skip
    exact, served, taken = parts.of(path)
    for one in (exact, served, taken):
        if one is not None:
            check_update(parts.base, path, one, file=parts.file)
    low = None if parts.full_rank else exact
    rank, stored = stored_error(low, dtype, tolerance, path) if low else (0, 0.0)
    plain = distance(rounded(low, dtype, path), low) if low else 0.0
    edited = parts.initial is not None or parts.mutated is not None or parts.dtype is not None
    four_bit = parts.requantize is not None and is_quantizable(path)
    return ModuleGap(
        (weight.shape[0], weight.shape[1]),
        weight=size,
        update=_distance(exact, None),
        unconverted=None if parts.served is None else _distance(served, exact),
        initial=None if parts.initial is None else _distance(taken, None),
        base_rounding=residual_error(weight, parts.trained_on(path, weight), taken) if edited else None,
        stored=None if parts.full_rank else stored,
        stored_plain=None if parts.full_rank else plain,
        quantized=residual_error(weight, parts.requantize(weight), None) if parts.requantize and four_bit else None,
        rank=rank,
        plain_rank=low.rank if low else 0,
        served_rank=served.rank if served else 0,
    )


def _distance(one: LoraFactors | None, other: LoraFactors | None) -> float:
    """Return |one - other|, where None is zero. Factors of high rank are multiplied out, some rows at a time."""
    if one is None or other is None:
        difference = one or other
    elif torch.equal(one.A, other.A) and torch.equal(one.B, other.B) and one.scale == other.scale:
        difference = None
    else:
        difference = subtract(one, other)
    if difference is None:
        return 0.0
    if difference.rank < min(difference.shape):
        return norm(difference)
    right = difference.A.double() * difference.scale  # (r, in)
    return math.sqrt(sum(float((B.double() @ right).square().sum()) for B in torch.split(difference.B, _rows(right))))


def rounded(factors: LoraFactors, dtype: torch.dtype, path: str | None = None) -> LoraFactors:
    """Return the factors of a module as a file in `dtype` holds them. Raises InputError (GS-3194) where it cannot."""
    stored = LoraFactors(factors.A.to(dtype), factors.B.to(dtype), factors.scale)
    if not (stored.A.isfinite().all() and stored.B.isfinite().all()):
        raise InputError(
            f"the update holds values that {dtype} cannot", code="GS-3194", tensor=path,
            hint="--dtype bfloat16 or float32",
        )  # fmt: skip
    return stored


def stored_update(
    exact: LoraFactors, dtype: torch.dtype, tolerance: float, path: str | None = None
) -> LoraFactors | None:
    """Return the update as `convert` stores it: compressed in float64, rounded once. None where nothing is left."""
    spectrum = compress(exact, tolerance=tolerance)
    return rounded(spectrum.first(spectrum.numerical_rank), dtype, path) if spectrum.numerical_rank else None


def stored_error(
    exact: LoraFactors, dtype: torch.dtype, tolerance: float, path: str | None = None
) -> tuple[int, float]:
    """Return the rank of `stored_update` and |stored - exact|."""
    stored = stored_update(exact, dtype, tolerance, path)
    return (0, norm(exact)) if stored is None else (stored.rank, distance(stored, exact))


def residual_error(weight: Tensor, held: Tensor, taken: LoraFactors | None) -> float:
    """Return |held - (weight - taken)|, all (out, in), in float64 by blocks of rows."""
    blocks = zip(_blocks(weight, taken), torch.split(held, _rows(weight)), strict=True)
    return math.sqrt(sum(float((other.double() - (block - part)).square().sum()) for (block, part), other in blocks))


def block_norm(weight: Tensor) -> float:
    """Return the Frobenius norm in float64."""
    return math.sqrt(sum(float(block.square().sum()) for block, _ in _blocks(weight, None)))


def _blocks(weight: Tensor, taken: LoraFactors | None) -> Iterator[tuple[Tensor, Tensor | float]]:
    """Yield some rows of weight and of taken, (rows, in) in float64, at a time."""
    size = _rows(weight)
    right = taken.A.double() * taken.scale if taken else None  # (r, in)
    for start in range(0, weight.shape[0], size):
        part = taken.B[start : start + size].double() @ right if taken is not None and right is not None else 0.0
        yield weight[start : start + size].double(), part


def _rows(weight: Tensor) -> int:
    return max(1, BLOCK // max(1, weight.shape[1]))


def is_quantizable(path: str) -> bool:
    """Return whether a 4-bit base holds this module in 4 bits: linear layers, but not the head."""
    return path.rpartition(".")[2] not in (*HEADS, *EMBEDDINGS)
