"""PiSSA of PEFT (Meng et al. 2024): P0 is the best rank-r part of W0, and training goes on from its factors.

`pissa` is computed again from W0, which is unique where the spectrum has a gap after r. `pissa_niter_N` is a randomized
SVD that no seed brings back: it needs the initial adapter or the edited base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from converters.decompose import principal, sharpened, singular_values
from converters.fresh import check_projection
from converters.initial import Rules, read_without_initial
from converters.pairs import pairs_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import InputError
from gora_serve.progress import Progress

UNIQUE = 1e-5  # how far σ_r must be above σ_{r+1}, relative: float32 cannot tell them apart below


def read(source: Source, inputs: Inputs) -> Reading:
    """Read PiSSA. Raises UsageError GS-232 for `pissa_niter_N` alone, InputError GS-3130 for no gap after r."""
    base = inputs.need_base("PiSSA edits the base; its conversion")
    rules = Rules("pissa", check=partial(check_projection, base))
    if source.config.get("init_lora_weights") != "pissa":
        return read_without_initial(source, inputs, rules)
    computed = "initial is the best approximation of W0 of rank r (SVD)"
    rules = replace(
        rules,
        compute=lambda path, rank: principal(base.weight(path), rank),
        computed=computed,
        refine=lambda path, initial: sharpened(base.weight(path), initial),
    )
    reading = read_without_initial(source, inputs, rules)
    if computed not in reading.method:
        return reading
    return replace(reading, notes=(*reading.notes, gap_note(base, _ranks(source, reading), inputs)))


def _ranks(source: Source, reading: Reading) -> dict[str, int]:
    pairs = pairs_of(source)
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
