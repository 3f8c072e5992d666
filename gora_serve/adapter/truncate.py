"""Which singular values to keep where not all modules can keep theirs: one choice over the whole adapter. No torch.

The result is ranks that differ from module to module, as GoRA's do: a module with large values keeps more of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Values = Mapping[str, Sequence[float]]  # module path -> singular values, descending


def ranks_of_budget(singular: Values, shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
    """Return ranks that keep the largest values, over all modules, within LoRA's parameter count at `rank`.

    shapes: (out, in). The budget is Σ (out + in) * rank; a value costs out + in. A value that no longer fits is passed
    over with those of its module that follow. Law: within the budget, and whole if the whole fits.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    left = sum(sum(shapes[path]) for path in singular) * rank
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
