"""Compressed updates that wait on disk, in float64, until the ranks of all modules are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gora_serve.adapter.linalg import Spectrum


@dataclass(frozen=True)
class Spilled:
    """One module's spectrum on disk. singular: descending. shape: (out, in). The rest is as Spectrum has it."""

    file: Path
    singular: tuple[float, ...]
    shape: tuple[int, int]
    rest: float
    numerical_rank: int

    def load(self) -> Spectrum:
        tensors = load_file(self.file)
        return Spectrum(tensors["A"], tensors["B"], tensors["singular"], self.rest, self.numerical_rank)


class Spill(Mapping[str, Spilled]):
    """Module path -> its spectrum, one file each in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._modules: dict[str, Spilled] = {}

    def put(self, path: str, spectrum: Spectrum) -> None:
        file = self.folder / f"{len(self._modules)}.safetensors"
        try:
            save_file({"A": spectrum.A, "B": spectrum.B, "singular": spectrum.singular}, file)
        except SafetensorError as err:  # how the library reports that a disk is full
            raise OSError(ENOSPC, f"updates that wait to be written: {err}", str(file)) from err
        shape = spectrum.B.shape[0], spectrum.A.shape[1]
        values = tuple(spectrum.singular.tolist())
        self._modules[path] = Spilled(file, values, shape, spectrum.rest, spectrum.numerical_rank)

    def __getitem__(self, path: str) -> Spilled:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
