"""Compressed updates that wait on disk, in float64, until the ranks of all modules are chosen."""

from __future__ import annotations

from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gora_serve.adapter.linalg import Spectrum
from gora_serve.adapter.spectra import Spectra


class Spill(Spectra):
    """Module path -> its spectrum, one file each in `folder`, which must not exist."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir()
        self.folder = folder

    def _put_away(self, spectrum: Spectrum) -> Callable[[], Spectrum]:
        file = self.folder / f"{len(self)}.safetensors"
        try:
            save_file({"A": spectrum.A, "B": spectrum.B, "singular": spectrum.singular}, file)
        except SafetensorError as err:  # how the library reports that a disk is full
            raise OSError(ENOSPC, f"updates that wait to be written: {err}", str(file)) from err
        rest, numerical_rank = spectrum.rest, spectrum.numerical_rank

        def load() -> Spectrum:
            tensors = load_file(file)
            return Spectrum(tensors["A"], tensors["B"], tensors["singular"], rest, numerical_rank)

        return load
