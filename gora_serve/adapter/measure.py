"""How far a written adapter is from the exact update: truncation and rounding, module by module, from its files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from gora_serve.adapter.format import read_adapter
from gora_serve.adapter.linalg import distance
from gora_serve.adapter.spectra import Spectra


@dataclass(frozen=True)
class ModuleError:
    """One module of the output. rank: as written; 0 where the module is left out. full_rank: the numerical rank before.

    norm: |dW| of the exact update. truncated: what the lower rank leaves out. error: exact less written, rounding and
    all. The three are Frobenius norms.
    """

    rank: int
    full_rank: int
    norm: float
    truncated: float
    error: float


def measure_written(folder: Path, spectra: Spectra, ranks: Mapping[str, int]) -> dict[str, ModuleError]:
    """Read back what was written and return how far it is from the exact update, module by module."""
    written = read_adapter(folder).modules
    errors = {}
    for path, module in spectra.items():
        spectrum, rank = module.load(), ranks[path]
        held = min(rank, spectrum.rank)
        norm, truncated = spectrum.dropped(0), spectrum.dropped(rank)
        error = math.hypot(distance(written[path], spectrum.first(spectrum.rank)), spectrum.rest) if held else norm
        errors[path] = ModuleError(rank, spectrum.numerical_rank, norm, truncated, error)
    return errors


def relative(modules: Iterable[ModuleError], name: str) -> float:
    """Return "error" or "truncated" of all modules together, as a share of the update's norm; 0 of nothing."""
    rows = [asdict(module) for module in modules]
    norm = float(sum(row["norm"] ** 2 for row in rows) ** 0.5)
    return float(sum(row[name] ** 2 for row in rows) ** 0.5) / norm if norm else 0.0


def rounded_away(modules: Iterable[ModuleError]) -> bool:
    """Tell whether the dtype has left nothing of what truncation would have left."""
    modules = list(modules)
    kept = [math.sqrt(max(one.norm**2 - one.truncated**2, 0.0)) for one in modules]
    lost = [math.sqrt(max(one.error**2 - one.truncated**2, 0.0)) for one in modules]
    return math.hypot(*lost) > 0.99 * math.hypot(*kept)
