"""What a base that an initialisation edited says: P0 = W0 - W_res, module by module.

In float32 the difference has rank r but for rounding; a W_res in 16 bits leaves its rounding on top, of full rank. A
base that is not edited, or that differs in more than an initialisation edits, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converters.decompose import nearest, nothing, principal
from gora_serve.adapter.factors import LoraFactors
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError

# Unit roundoffs: the norm of what rounding to a dtype changes is at most this share of the tensor's.
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class MutatedBase:
    """W0 and W_res side by side. quantized: W_res is a dequantized Q, a full-rank step away from W0 - P0 (LoftQ)."""

    base: BaseWeights
    mutated: BaseWeights
    quantized: bool = False

    def difference(self, path: str) -> Tensor | None:
        """Return W0 - W_res, (out, in), float64; None where they differ by no more than W_res' rounding."""
        return _difference(self.base.weight(path), self.mutated.weight(path))

    def initial(self, path: str, rank: int) -> LoraFactors:
        """Return P0 of a module: the best approximation of W0 - W_res of the adapter's rank.

        Raises BindingError GS-436 where what is left is more than rounding: then the other model was trained.
        """
        D = self.difference(path)
        if D is None:
            return nothing(self.base.shape(path))
        found = principal(D, rank) if self.quantized else nearest(D, rank)
        left, size = float((D - found.delta()).norm()), float(D.norm())
        if not self.quantized and left > self.tolerance(path) + 1e-5 * size:
            raise BindingError(
                "the mutated base is not the base less a part of the adapter's rank", code="GS-436",
                file=self.mutated.folder, tensor=path, expected=f"a difference of rank {rank}, up to rounding",
                actual=f"{left / size:.1%} of it is left beyond rank {rank}",
                hint="a model that was fine-tuned after the initialisation is no mutated base; nor is another model",
            )  # fmt: skip
        return found

    def check_initial(self, path: str, initial: LoraFactors, file: Path) -> None:
        """Raise BindingError (GS-432) unless P0 of an initial adapter is what this base lacks, up to rounding.

        A quantized base is only asked whether P0 takes it nearer to W0.
        """
        D = self.difference(path)
        size = initial.delta().norm()
        gap = (-initial.delta() if D is None else D - initial.delta()).norm()
        stored = min(initial.A.dtype, initial.B.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        allowed = self.tolerance(path) + 4 * ROUNDOFF[stored] * size + 1e-5 * size
        if self.quantized:
            allowed = torch.zeros(()) if D is None else 0.999 * D.norm()
        if gap > allowed and gap > 0:
            raise BindingError(
                "the initial adapter is not what the mutated base lacks", code="GS-432", file=file, tensor=path,
                expected=f"s B0 A0 = W0 - W_res up to {float(allowed):.2e}", actual=f"{float(gap):.2e} apart",
                hint="give the initial adapter and the edited base of one and the same run",
            )  # fmt: skip

    def tolerance(self, path: str) -> float:
        """The norm that rounding to W_res' dtype can have: of W0 when it was loaded, of W_res when it was made.

        In float32 it is that of the arithmetic too: KaSA puts W_res together from an SVD, some roundoffs off.
        """
        weight = self.mutated.weight(path)
        sizes = float(weight.double().norm()) + float(self.base.weight(path).double().norm())
        return ROUNDOFF.get(weight.dtype, 0.0) * sizes * (8 if weight.dtype == torch.float32 else 1)

    def check(self, modules: Iterable[str]) -> None:
        """Refuse what is no edited base of this adapter, whose modules with a P0 these are.

        Raises BindingError: GS-439 for a module that W_res lacks or has in another shape, GS-435 where another tensor
        differs, GS-434 where no module does.
        """
        paths = list(modules)
        for path in paths:
            self._check_shape(path)
        edited = {self.mutated.find(path) for path in paths}
        for name in self.mutated.tensors:
            if name not in edited:
                self._check_same(name)
        if all(self.difference(path) is None for path in paths):
            raise BindingError(
                "the mutated base is the base: nothing was taken out of it", code="GS-434", file=self.mutated.folder,
                hint="save the base after the initialisation (model.unload().save_pretrained), not before",
            )  # fmt: skip

    def _check_shape(self, path: str) -> None:
        if self.mutated.find(path) is None or self.mutated.shape(path) != self.base.shape(path):
            raise BindingError(
                "the mutated base has no such module, or it has another shape", code="GS-439",
                file=self.mutated.folder, tensor=path, expected=self.base.shape(path),
                hint="--mutated-base is the edited base of this adapter, saved whole",
            )  # fmt: skip

    def _check_same(self, name: str) -> None:
        ours = self.base.find_parameter(name) or self.base.find(name.removesuffix(".weight"))
        same_shape = ours is not None and self.base.tensors.shape(ours) == self.mutated.tensors.shape(name)
        if ours and same_shape and _difference(self.base.tensors[ours], self.mutated.tensors[name]) is None:
            return
        raise BindingError(
            "the mutated base differs from the base where the adapter has nothing", code="GS-435",
            file=self.mutated.folder, tensor=name,
            hint="it comes from another base, from another adapter or was trained",
        )  # fmt: skip


def _difference(ours: Tensor, other: Tensor) -> Tensor | None:
    D = ours.double() - other.double()
    rounding = 0.0 if ours.dtype == other.dtype else ROUNDOFF.get(other.dtype, 0.0)
    return D if float(D.norm()) > rounding * float(ours.double().norm()) else None
