"""Whether an adapter is as its initialisation left it: a part of the base, or singular vectors. Later steps show.

In float32 both hold to rounding, and a step of training is far above it; where the base or the adapter has 16 bits,
their rounding is what can be told apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from converters.decompose import transposed
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import norm
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError

EXACT = 1e-3  # relative; float32 is at 1e-5 and below
ROUNDED = 0.02  # relative; bfloat16 is at 0.005
SIXTEEN = (torch.bfloat16, torch.float16)
HINT = "give the initial adapter of the same run, saved before any step, and the base it was made on"


def is_rounded(initial: LoraFactors) -> bool:
    """Tell whether all values are those of a 16-bit type, whatever they are stored in.

    PEFT makes A0 and B0 in the type of the base's weights, and keeps them in float32 from then on.
    """
    factors = (initial.A, initial.B)
    return any(all(torch.equal(one.to(dtype).to(one.dtype), one) for one in factors) for dtype in SIXTEEN)


def allowed(initial: LoraFactors) -> float:
    """Return how far an initial adapter may be off, relatively."""
    return ROUNDED if is_rounded(initial) else EXACT


def check_projection(base: BaseWeights, path: str, initial: LoraFactors, file: Path, *, exact: float = EXACT) -> None:
    """Raise BindingError (GS-433) unless P0 is W0 projected on P0's own columns, or on its own rows."""
    W = base.weight(path)
    off = off_projection(W, initial)
    if off > max(_allowed_part(W, initial), exact):
        raise BindingError(
            "the initial adapter is no part of this base", code="GS-433", file=file, tensor=path,
            expected="s B0 A0 = W0 projected on its own columns", actual=f"{off:.1%} of it is off", hint=HINT,
        )  # fmt: skip


def _allowed_part(W: Tensor, initial: LoraFactors) -> float:
    """Return how far a part of W0 may be off: what rounding W0 does to a small part (MiLoRA's) comes on top."""
    limit = allowed(initial)
    roundoff = 1e-6 if limit == EXACT else 2**-8
    return limit + roundoff * float(W.double().norm()) / max(norm(initial), 1e-300)


def check_orthogonal(path: str, initial: LoraFactors, file: Path) -> None:
    """Raise BindingError (GS-433) unless A0's rows and B0's columns are orthogonal, as singular vectors are."""
    off = off_orthogonal(initial)
    if off > allowed(initial):
        raise BindingError(
            "the initial adapter does not hold singular vectors", code="GS-433", file=file, tensor=path,
            expected="rows of A and columns of B with cosines near 0", actual=f"a cosine of {off:.2g}", hint=HINT,
        )  # fmt: skip


def check_either(base: BaseWeights, path: str, initial: LoraFactors, file: Path) -> None:
    """Raise BindingError (GS-433) unless P0 is a part of W0, or of singular vectors, as LoRA-GA's is.

    LoftQ's is of singular vectors too, with √S on both sides, and is made without the scale: GS-441.
    """
    W = base.weight(path)
    is_near = off_projection(W, initial) < max(5 * ROUNDED, _allowed_part(W, initial))
    if is_near or off_orthogonal(initial) > allowed(initial):
        check_projection(base, path, initial, file)
    elif _is_balanced(initial):
        raise BindingError(
            "the initial adapter is no part of this base, and looks like LoftQ's", code="GS-441", file=file,
            tensor=path, hint="--from loftq, where the model was quantized; LoftQ's update has no scale",
        )  # fmt: skip


def _is_balanced(initial: LoraFactors) -> bool:
    """Tell whether A = √S Vᵀ and B = U √S with values S that differ."""
    rows, columns = initial.A.double().norm(dim=1), initial.B.double().norm(dim=0)  # (r,), (r,)
    balanced = float((rows - columns).norm() / rows.norm()) < ROUNDED
    return balanced and float(rows.max() / rows.min().clamp(min=1e-30)) > 1 + ROUNDED


def off_projection(W: Tensor, initial: LoraFactors) -> float:
    """Return how far P0 is from W0 projected on P0's columns or on its rows, whichever is nearer, of its norm.

    Both are 0 for an exact SVD, one of them for a randomized one. Thin products only: |P0 - U Uᵀ W0| = |Uᵀ P0 - Uᵀ W0|.
    """
    W = W.double()
    return min(_off(W, initial), _off(W.T, transposed(initial)))


def _off(W: Tensor, initial: LoraFactors) -> float:
    U = torch.linalg.qr(initial.B.double()).Q  # (out, r)
    core = initial.scale * (U.T @ initial.B.double()) @ initial.A.double()  # (r, in)
    return float((core - U.T @ W).norm() / core.norm())


def off_orthogonal(initial: LoraFactors) -> float:
    """Return the largest cosine of two of A's rows, or of two of B's columns."""
    return max(_largest_cosine(initial.A.double()), _largest_cosine(initial.B.double().T))


def _largest_cosine(rows: Tensor) -> float:
    """Of any two rows (r, n), leaving out those of norm 0."""
    norms = rows.norm(dim=1)
    rows = rows[norms > 1e-12 * norms.max()]
    unit = torch.nn.functional.normalize(rows, dim=1)
    return float((unit @ unit.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max()) if len(rows) else 0.0


def likeness(W: Tensor, initial: LoraFactors) -> float:
    """Return the cosine of P0 with W0 projected on P0's columns: 1 for a part of W0."""
    U = torch.linalg.qr(initial.B.double()).Q  # (out, r)
    core = initial.scale * (U.T @ initial.B.double()) @ initial.A.double()  # (r, in)
    return float(torch.cosine_similarity(core.flatten(), (U.T @ W.double()).flatten(), dim=0))
