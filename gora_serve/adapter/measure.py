"""How far a written adapter is from the exact update: truncation and rounding, module by module, from its files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


class Measured:
    """Something written whose errors are known, module by module."""

    modules: Mapping[str, ModuleError]

    @property
    def error(self) -> float:
        """Relative error of the whole adapter, Frobenius over all modules together."""
        return self._share("error")

    @property
    def truncated(self) -> float:
        """The part of it that truncation caused."""
        return self._share("truncated")

    def _share(self, name: str) -> float:
        norm = math.hypot(*(module.norm for module in self.modules.values()))
        return math.hypot(*(getattr(module, name) for module in self.modules.values())) / norm if norm else 0.0


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


def rounded_away(modules: Iterable[ModuleError]) -> bool:
    """Tell whether the dtype has left nothing of what truncation would have left."""
    modules = list(modules)
    kept = [math.sqrt(max(one.norm**2 - one.truncated**2, 0.0)) for one in modules]
    lost = [math.sqrt(max(one.error**2 - one.truncated**2, 0.0)) for one in modules]
    return math.hypot(*lost) > 0.99 * math.hypot(*kept)
