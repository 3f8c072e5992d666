"""Several adapters of one base as one adapter: `combine`. Pure: adapters in, an adapter out.

One module is in memory at a time, and the chosen part of each spectrum where no `Spill` is given to put it away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.linalg import Spectrum, compress, leading
from gora_serve.adapter.spectra import Spectra
from gora_serve.adapter.truncate import choose_ranks, most_directions
from gora_serve.config import MergeMethod
from gora_serve.deploy.combine_whole import combine_carried
from gora_serve.deploy.methods import Method, Term, method_named
from gora_serve.deploy.update import check_size
from gora_serve.errors import BindingError, InputError
from gora_serve.progress import Listener, Progress, silent

Weighted = Sequence[tuple[Adapter, float]]
LARGEST = 1e150  # of an update's elements: their squares are finite in float64
TRUNCATED = ("svd", "ties", "dare")  # these get no more parameters than the largest adapter, where nothing is said


@dataclass(frozen=True)
class Limits:
    """What the result may have, at most one of the three; none: the method's own."""

    rank: int | None = None
    tolerance: float | None = None
    parameters: int | None = None

    @property
    def is_open(self) -> bool:
        return self.rank is None and self.tolerance is None and self.parameters is None


@dataclass(frozen=True)
class Combined:
    """The merged update before it is rounded. spectra: of each module, as far as computed. ranks: what is kept, 0 where
    a module is left out. weights: as they were applied, in the order of the adapters. limits: as they were applied.
    """

    adapter: Adapter
    spectra: Spectra
    ranks: Mapping[str, int]
    weights: tuple[float, ...]
    limits: Limits


def combine(
    adapters: Weighted,
    method: MergeMethod,
    limits: Limits,
    *,
    density: float | None = None,
    seed: int = 0,
    base: BaseId | None = None,
    spectra: Spectra | None = None,
    precision: float = 0.0,
    listen: Listener = silent,
) -> Combined:
    """Return one adapter for several, each with its weight, on the base that they share.

    cat: Σ weight * update, exact. linear: the same sum with weights divided by their own sum: a weighted mean. svd: the
    sum, in no more parameters than the largest adapter has. ties and dare: `methods`, with `density` (0.2 and 0.5), of
    full rank, and truncated as svd is. `limits` truncate over all modules together, as in `choose_ranks`. Ranks, scales
    and modules may differ from adapter to adapter; a module that one lacks is zero there. What is carried is
    `combine_carried`'s. The order of the adapters makes no difference.
    base: what the result is bound to, where the caller has seen the base itself. spectra: where the spectra are put.
    precision: what a module may lose without any limit, as a share of its norm.

    The adapter has no module where all updates cancel. Raises BindingError: GS-4450 for adapters of different bases,
    GS-4451 for a module of two shapes. InputError: GS-3450 for weights that say nothing, GS-3451 for carried tensors
    that conflict, GS-3453 for different tasks, GS-3105 for NaN.
    """
    weights = applied_weights([weight for _, weight in adapters], method)
    given = [(adapter, weight) for (adapter, _), weight in zip(adapters, weights, strict=True) if weight]
    bound_to = base or shared_base([adapter for adapter, _ in adapters])
    shapes = _shapes(given)
    carried = combine_carried(given, method)
    limits = _limits(given, method, limits)
    formula = method_named(method, density=density, seed=seed)
    spectra = spectra if spectra is not None else Spectra()
    for index, path in enumerate(shapes):
        spectra.put(path, _spectrum(given, path, formula, shapes, limits, precision))
        listen(Progress("merge", index + 1, len(shapes)))
    ranks = choose_ranks(spectra, rank=limits.rank, tolerance=limits.tolerance, parameters=limits.parameters)
    adapter = _adapter(given, spectra, ranks, bound_to, carried)
    return Combined(adapter, spectra, ranks, tuple(weights), limits)


def applied_weights(weights: Sequence[float], method: MergeMethod) -> list[float]:
    """Return the weights as the method takes them. Raises InputError (GS-3450)."""
    usable = any(weights) and math.isfinite(sum(map(abs, weights)))
    total = math.fsum(weights) if usable else 0.0
    if not usable or (method == "linear" and abs(total) < 1e-9 * math.fsum(map(abs, weights))):
        raise InputError(
            "these weights say nothing" if not usable else "linear divides by the sum of the weights, which is zero",
            code="GS-3450", expected="finite weights, not all of them 0", actual=", ".join(map(str, weights)) or "none",
            hint="--method cat takes the weights as they are" if usable else "-a ADAPTER:WEIGHT",
        )  # fmt: skip
    return [weight / total for weight in weights] if method == "linear" else list(weights)


def _limits(given: Weighted, method: MergeMethod, limits: Limits) -> Limits:
    if method in TRUNCATED and limits.is_open:
        return Limits(parameters=max(adapter.parameters for adapter, _ in given))
    return limits


def shared_base(adapters: Sequence[Adapter]) -> BaseId:
    """Return the base of all adapters. Raises BindingError (GS-4450) where it is not one, or cannot be known to be one.

    It is bound only where all of them are; asserted where one is. Of several names for the same weights the result has
    one with a revision, if there is any, and the first in the alphabet.
    """
    found = {adapter.base for adapter in adapters}
    bases = sorted(found, key=lambda base: (base.revision is None, base.name, repr(base)))
    roots = {base.roots.weights for base in bases if base.roots}
    unbound = [base for base in bases if base.roots is None]
    if len(roots) > 1 or (unbound and len({base.name for base in bases}) > 1):
        why = "belong to different bases" if len(roots) > 1 else "name different bases, and not all of them are bound"
        one, other = bases[0], next(base for base in bases if base != bases[0])
        raise BindingError(
            f"the adapters {why}", code="GS-4450", expected=_named(one), actual=_named(other),
            hint="merge adapters of one base; `bind` says which one an adapter belongs to",
        )  # fmt: skip
    if unbound:
        return BaseId(bases[0].name, bases[0].revision)
    return BaseId(bases[0].name, bases[0].revision, bases[0].roots, any(base.asserted for base in bases))


def _named(base: BaseId) -> str:
    return f"{base.name} ({base.roots.weights if base.roots else 'not bound'})"


def _shapes(given: Weighted) -> dict[str, tuple[int, int]]:
    """Return module path -> (out, in) over all adapters, sorted. Raises GS-4451 for two shapes, GS-3105 for NaN."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter, _ in given:
        for path, factors in adapter.modules.items():
            check_size(path, factors)
            if shapes.setdefault(path, factors.shape) != factors.shape:
                raise BindingError(
                    "two adapters have this module in different shapes", code="GS-4451", tensor=path,
                    expected=shapes[path], actual=factors.shape, hint="merge adapters of one base",
                )  # fmt: skip
    return dict(sorted(shapes.items()))


def _spectrum(
    given: Weighted,
    path: str,
    formula: Method,
    shapes: Mapping[str, tuple[int, int]],
    limits: Limits,
    precision: float,
) -> Spectrum:
    terms = [Term(adapter.modules[path], weight) for adapter, weight in given if path in adapter.modules]
    merged = formula(path, terms)
    _check_size(path, merged)
    count = most_directions(shapes, rank=limits.rank, tolerance=limits.tolerance, parameters=limits.parameters)
    return compress(merged, tolerance=precision) if count is None else leading(merged, count, tolerance=precision)


def _check_size(path: str, merged: LoraFactors) -> None:
    """Raise InputError (GS-3455) for factors whose squares are not finite in float64; NaN among them."""
    size = abs(merged.scale) * math.prod(float(one.abs().max()) for one in (merged.A, merged.B) if one.numel())
    if not size < LARGEST:
        raise InputError(
            "the merged update is beyond all numbers", code="GS-3455", tensor=path,
            expected=f"values below {LARGEST:g}", actual=f"{size:g}",
            hint="look at the weights, and at lora_alpha of each adapter",
        )  # fmt: skip


def _adapter(
    given: Weighted, spectra: Spectra, ranks: Mapping[str, int], base: BaseId, carried: Mapping[str, Tensor]
) -> Adapter:
    adapters = [adapter for adapter, _ in given]
    kept = [path for path, rank in ranks.items() if rank]

    def factors(path: str) -> LoraFactors:
        return spectra[path].load().first(ranks[path])

    return Adapter(
        LazyModules(kept, factors),
        base,
        carried=carried,
        task_type=_task(adapters),
        fan_in_fan_out=all(adapter.fan_in_fan_out for adapter in adapters),
        embeddings=frozenset(path for adapter in adapters for path in adapter.embeddings if path in kept),
    )


def _task(adapters: Sequence[Adapter]) -> str | None:
    """Return the task type that the adapters name. Raises InputError (GS-3453) for two of them."""
    tasks = sorted({adapter.task_type for adapter in adapters if adapter.task_type})
    if len(tasks) > 1:
        raise InputError(
            "the adapters are for different kinds of model", code="GS-3453", expected=tasks[0], actual=tasks[1],
            hint="merge adapters of one task_type; adapter_config.json says it",
        )  # fmt: skip
    return tasks[0] if tasks else None
