"""CorDA of PEFT (Yang et al. 2024): P0 = U S Vᵀ, a part of W0 that the covariance of activations picks.

The covariance is not in the adapter. PEFT's cache file holds U, S and V at rank r and so is P0; it is a pickle, opened
by torch's loader for weights only where that is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from converters.fresh import ROUNDED, check_projection
from converters.initial import Rules, read_without_initial
from converters.reading import Inputs, Reading
from converters.source import PickledTensors, Source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.tensors import TensorFiles
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError

PARTS = ("U_WC", "S_WC", "V_WC")  # U (out, r), S (r,), V (in, r)


def read(source: Source, inputs: Inputs) -> Reading:
    """Read CorDA. Raises UsageError GS-232 without any source of P0, and what `_open_cache` and `_part` raise."""
    base, file = inputs.need_base("CorDA edits the base; its conversion"), inputs.cache
    if file is None or inputs.init_adapter or inputs.mutated_base:
        return read_without_initial(
            source, inputs, Rules("corda", check=partial(check_projection, base, exact=ROUNDED))
        )
    cache = _open_cache(file, pickles=inputs.pickles)
    rules = Rules(
        "corda",
        lambda path, rank: _part(cache, file, base, path, rank),
        f"initial is U S Vᵀ of CorDA's cache {file}",
        files=(file,),
    )
    return read_without_initial(source, inputs, rules)


def _open_cache(file: Path, *, pickles: bool) -> Mapping[str, Tensor]:
    """Open PEFT's cache, or the same in safetensors. Raises InputError: GS-3131 unasked, GS-3114 no tensors."""
    if file.suffix == ".safetensors":
        return TensorFiles([file])
    if not pickles:
        raise InputError(
            "CorDA's cache is a pickle; pickles can run code and are not opened unasked", code="GS-3131", file=file,
            hint="--allow-pickle opens it by torch's loader for weights only",
        )  # fmt: skip
    return PickledTensors(file)


def _part(cache: Mapping[str, Tensor], file: Path, base: BaseWeights, path: str, rank: int) -> LoraFactors:
    """Return P0 = U S Vᵀ of a module. Raises BindingError (GS-437) for a cache of another model or rank."""
    names = [f"{path}.eigens.{part}" for part in PARTS]
    out, inner = base.shape(path)
    expected = [(out, rank), (rank,), (inner, rank)]
    actual = [tuple(cache[name].shape) if name in cache else None for name in names]
    if actual != expected:
        raise BindingError(
            "the cache is not of this adapter", code="GS-437", file=file, tensor=path,
            expected=f"U, S, V of shapes {expected}", actual=actual, hint="give the cache file of the same run",
        )  # fmt: skip
    U, S, V = (cache[name].double() for name in names)
    return LoraFactors(V.T, U * S, 1.0)
