"""Which singular values to keep where not all modules can keep theirs: one choice over the whole adapter. No tensors.

The result is ranks that differ from module to module, as GoRA's do: a module with large values keeps more of them.
The one place for what --rank, --tolerance and a number of parameters mean, in conversion and in merging.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gora_serve.adapter.spectra import Kept

LEADING = 8  # times the rank that is asked for: the most that a module of full rank can get
Values = Mapping[str, Sequence[float]]  # module path -> singular values, descending
Shapes = Mapping[str, tuple[int, int]]  # module path -> (out, in)


def choose_ranks(
    spectra: Mapping[str, Kept],
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    parameters: int | None = None,
) -> dict[str, int]:
    """Return the rank of each module, 0 where nothing is left of it: the numerical one, or one choice over all.

    At most one of the three is given. rank: the budget is LoRA's at this rank over all modules (`ranks_of_budget`);
    parameters: the budget itself; tolerance: as `ranks_of_tolerance` has it.
    """
    if tolerance is not None:
        return ranks_of_tolerance({path: module.singular for path, module in spectra.items()}, tolerance)
    singular = {path: module.singular[: module.numerical_rank] for path, module in spectra.items()}
    shapes = {path: module.shape for path, module in spectra.items()}
    if parameters is not None:
        return ranks_of_parameters(singular, shapes, parameters)
    if rank is not None:
        return ranks_of_budget(singular, shapes, rank)
    return {path: len(values) for path, values in singular.items()}


def most_directions(
    shapes: Shapes, *, rank: int | None = None, tolerance: float | None = None, parameters: int | None = None
) -> int | None:
    """Return how many directions of a module of full rank are computed, LEADING * rank; None: all of them.

    parameters count as the rank at which LoRA on these modules has as many, rounded up.
    """
    if tolerance is not None:
        return None
    if rank is None and parameters is not None:
        rank = max(1, math.ceil(parameters / sum(map(sum, shapes.values()))))
    return None if rank is None else LEADING * rank


def ranks_of_budget(singular: Values, shapes: Shapes, rank: int) -> dict[str, int]:
    """Return ranks that keep the largest values, over all modules, within LoRA's parameter count at `rank`.

    The budget is Σ (out + in) * rank; the rest is `ranks_of_parameters`.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    return ranks_of_parameters(singular, shapes, sum(sum(shapes[path]) for path in singular) * rank)


def ranks_of_parameters(singular: Values, shapes: Shapes, parameters: int) -> dict[str, int]:
    """Return ranks that keep the largest values, over all modules, within a number of parameters.

    A value costs out + in. A value that no longer fits is passed over with those of its module that follow. Law: within
    the budget, and whole if the whole fits.
    """
    left = parameters
    ranks = dict.fromkeys(singular, 0)
    closed: set[str] = set()
    for _, path in _descending(singular):
        cost = sum(shapes[path])
        if path in closed or cost > left:
            closed.add(path)
            continue
        ranks[path] += 1
        left -= cost
    return ranks


def ranks_of_tolerance(singular: Values, tolerance: float) -> dict[str, int]:
    """Return the ranks that drop the smallest values, over all modules, up to `tolerance` of the whole adapter's norm.

    Law: the Frobenius norm of what is dropped is at most tolerance * that of all, and one value more would exceed it.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be at least 0 and less than 1, not {tolerance}")
    ranks = {path: len(values) for path, values in singular.items()}
    allowed = tolerance**2 * math.fsum(value**2 for values in singular.values() for value in values)
    dropped = 0.0
    for value, path in reversed(_descending(singular)):
        if dropped + value**2 > allowed:
            break
        dropped += value**2
        ranks[path] -= 1
    return ranks


def _descending(singular: Values) -> list[tuple[float, str]]:
    """Return all values with their modules, the largest first; equal ones in the order of the modules."""
    pairs = [(value, path) for path, values in singular.items() for value in values]
    return sorted(pairs, key=lambda pair: -pair[0])
