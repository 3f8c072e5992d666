"""PiSSA of PEFT (Meng et al. 2024): P0 is the best rank-r part of W0, and training goes on from its factors.

`pissa` is computed again from W0, which is unique where the spectrum has a gap after r. `pissa_niter_N` is a randomized
SVD that no seed brings back: it needs the initial adapter or the edited base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from converters import lora
from converters.decompose import principal, singular_values, transposed
from converters.initial import Rules, read_without_initial
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError
from gora_serve.progress import Progress

UNIQUE = 1e-5  # how far σ_r must be above σ_{r+1}, relative: float32 cannot tell them apart below
SUBSPACE = 0.05  # of |P0|: how far it may be from a projection of W0; bfloat16 factors are at 0.005


def read(source: Source, inputs: Inputs) -> Reading:
    """Read PiSSA. Raises UsageError GS-232 for `pissa_niter_N` alone, InputError GS-3130 for no gap after r."""
    base = inputs.need_base("PiSSA edits the base; its conversion")
    rules = Rules("pissa", check=lambda path, factors, file: check_projection(base, path, factors, file))
    if source.config.get("init_lora_weights") != "pissa":
        return read_without_initial(source, inputs, rules)
    computed = "initial is the best approximation of W0 of rank r (SVD)"
    rules = replace(rules, compute=lambda path, rank: principal(base.weight(path), rank), computed=computed)
    reading = read_without_initial(source, inputs, rules)
    if computed not in reading.method:
        return reading
    return replace(reading, notes=(*reading.notes, gap_note(base, _ranks(source, reading), inputs)))


def _ranks(source: Source, reading: Reading) -> dict[str, int]:
    pairs = lora.pairs_of(source)
    return {path: source.tensors.shape(pairs[path].A)[0] for path in reading.initial or ()}


def gap_note(base: BaseWeights, ranks: Mapping[str, int], inputs: Inputs, *, smallest: bool = False) -> str:
    """Return the smallest gap σ_r / σ_{r+1} over the modules, in a sentence; of the r smallest values if asked.

    Raises InputError (GS-3130) where a gap is too small for the split to be unique.
    """
    gaps = {}
    for index, (path, rank) in enumerate(ranks.items()):
        S = singular_values(base.weight(path))  # (k,)
        cut = len(S) - rank if smallest else rank
        gaps[path] = float(S[cut - 1] / S[cut]) if 0 < cut < len(S) else float("inf")
        if gaps[path] < 1 + UNIQUE:
            raise InputError(
                "the spectrum of the base has no gap where the initialisation cuts it: what it took out is not unique",
                code="GS-3130", file=base.folder, tensor=path,
                actual=f"values {cut} and {cut + 1} have the ratio {gaps[path]:.8f}",
                hint="give --init-adapter or --mutated-base",
            )  # fmt: skip
        inputs.listen(Progress("spectra", index + 1, len(ranks)))
    path = min(gaps, key=lambda path: gaps[path])
    return f"The initial part of W0 is unique: its smallest gap between singular values is {gaps[path]:.6f}, in {path}."


def check_projection(base: BaseWeights, path: str, initial: LoraFactors, file: Path) -> None:
    """Raise BindingError (GS-433) unless P0 is W0 projected on P0's own columns, or on its own rows.

    Both hold for an exact SVD, one of them for a randomized one. Thin products only: |P0 - U Uᵀ W0| = |Uᵀ P0 - Uᵀ W0|.
    """
    W = base.weight(path).double()
    off = min(_off(W, initial), _off(W.T, transposed(initial)))
    if off > SUBSPACE:
        raise BindingError(
            "the initial adapter is no principal part of this base", code="GS-433", file=file, tensor=path,
            expected="s B0 A0 = W0 projected on its own columns", actual=f"{off:.1%} of it is off",
            hint="give the initial adapter of the same run, saved before any step, and the base it was made on",
        )  # fmt: skip


def _off(W: torch.Tensor, initial: LoraFactors) -> float:
    U = torch.linalg.qr(initial.B.double()).Q  # (out, r)
    core = initial.scale * (U.T @ initial.B.double()) @ initial.A.double()  # (r, in)
    return float((core - U.T @ W).norm() / core.norm())
