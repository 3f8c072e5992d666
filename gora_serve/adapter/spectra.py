"""The spectra of all modules while the ranks are chosen, which takes all their singular values at once.

In memory here; `spill` keeps them on disk, one at a time in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gora_serve.adapter.linalg import Spectrum


@dataclass(frozen=True)
class Kept:
    """One module's spectrum, put away. singular: descending. shape: (out, in). The rest is as Spectrum has it; `load`
    returns the spectrum itself.
    """

    singular: tuple[float, ...]
    shape: tuple[int, int]
    rest: float
    numerical_rank: int
    load: Callable[[], Spectrum]


class Spectra(Mapping[str, Kept]):
    """Module path -> its spectrum, put away."""

    def __init__(self) -> None:
        self._modules: dict[str, Kept] = {}

    def put(self, path: str, spectrum: Spectrum) -> None:
        shape = spectrum.B.shape[0], spectrum.A.shape[1]
        values = tuple(spectrum.singular.tolist())
        self._modules[path] = Kept(values, shape, spectrum.rest, spectrum.numerical_rank, self._put_away(spectrum))

    def _put_away(self, spectrum: Spectrum) -> Callable[[], Spectrum]:
        return lambda: spectrum

    def __getitem__(self, path: str) -> Kept:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
