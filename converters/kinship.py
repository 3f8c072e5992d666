"""Whether an initial adapter is of the same run as a trained one: by its modules, ranks and scales, and by its numbers.

Whether it is what its initialisation makes of the base is asked in `fresh.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from converters.source import Source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.errors import BindingError

KINSHIP = 0.25  # mean cosine of trained and initial factors: another run's is near 0, one's own above 0.5
OTHERS = re.compile(r"\.lora_(magnitude_vector|E|diag)(\.|$)")
TURNED = 0.02  # share of A's rows with a cosine below -0.5


def check_plain(origin: Source) -> None:
    """Raise BindingError (GS-430) where the initial adapter has factors of another family beside A and B."""
    odd = next((name for name in origin.tensors if OTHERS.search(name)), None)
    if odd is not None:
        raise BindingError(
            "the initial adapter is of another family than the trained one", code="GS-430", file=origin.weights,
            tensor=odd, hint="give the initial adapter of the same run",
        )  # fmt: skip


def check_same_form(origin: Source, trained: Mapping[str, LoraFactors], initial: Mapping[str, LoraFactors]) -> None:
    """Raise BindingError (GS-430) unless modules, ranks, shapes and scales of both are the same."""
    missing = sorted(trained.keys() ^ initial.keys())
    if missing:
        raise BindingError(
            "the initial adapter has other modules than the trained one", code="GS-430", file=origin.weights,
            tensor=missing[0], hint="give the initial adapter of the same run",
        )  # fmt: skip
    for path, ours in trained.items():
        one = initial[path]
        expected, actual = [f"rank {x.rank}, shape {x.shape}, scale {x.scale:.6g}" for x in (ours, one)]
        if expected != actual:
            raise BindingError(
                "the initial adapter has another rank, shape or scale than the trained one", code="GS-430",
                file=origin.weights, tensor=path, expected=expected, actual=actual,
                hint="give the initial adapter of the same run, with the configuration of the same run",
            )  # fmt: skip


def check_kinship(
    origin: Source, trained: Mapping[str, LoraFactors], initial: Mapping[str, LoraFactors], paths: list[str]
) -> None:
    """Raise BindingError where the trained adapter cannot have grown out of the initial one.

    Training moves each row of A and column of B a little from where it began: their mean cosine over all modules stays
    well above 0 in A or in B, and none is turned around. Another run's are near 0 in both; those of the same gradient
    by another randomized SVD are large, of random sign. GS-438: B0 A0 is zero.
    """
    rows, columns, size = [], [], 0.0
    for path in paths:
        one, other = trained[path], initial[path]
        rows.append(torch.cosine_similarity(one.A.double(), other.A.double(), dim=1))  # (r,)
        columns.append(torch.cosine_similarity(one.B.double(), other.B.double(), dim=0))
        size += float(other.A.double().norm() * other.B.double().norm())
    if size == 0:
        raise BindingError(
            "the initial adapter adds nothing: it was not made by the initialisation", code="GS-438",
            file=origin.weights, hint="save it after the initialisation, and before any step of training",
        )  # fmt: skip
    of_A, of_B = float(torch.cat(rows).mean()), float(torch.cat(columns).mean())
    turned = float((torch.cat(rows) < -0.5).double().mean())  # B0 can be so small that training turns it around
    if max(of_A, of_B) < KINSHIP or turned > TURNED:
        raise BindingError(
            "the trained adapter did not grow out of this initial one", code="GS-431", file=origin.weights,
            expected=f"a mean cosine of their factors above {KINSHIP}, and no row of A turned around",
            actual=f"{of_A:.2f} for A, {of_B:.2f} for B; {turned:.0%} of A turned around",
            hint="give the initial adapter of the same run, or the edited base by --mutated-base",
        )  # fmt: skip
