"""What an adapter's weights say of its family, where its configuration does not: measured on a few modules, in seconds.

Thin products only: a factor's QR and W0 times r vectors, no SVD of a weight. The numbers at the constants are medians
over modules, measured on adapters of PEFT trained from 1 step to the collapse of the loss, on tiny models and on
SmolLM2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import GoraError, counted

SAMPLE = 8  # modules
LARGE = 1 << 25  # elements of a weight: larger modules are sampled only where there are no others
PARALLEL = 0.5  # rows of A with rows of A0: subtracted adapters are at 0.73 to 1.0, others within 0.1 of 0
NEAR = 0.4  # s B A with W0 projected on its own subspaces: PiSSA 0.64 to 1.0, OLoRA 0.77 to 1.0, others below 0.1
STRANGE = 0.2  # the same, for an adapter whose initialisation was a projection of another base
FIRST = 0.65  # W0's first r columns within B's columns: OLoRA 0.73 to 1.0, PiSSA below 0.6
EVEN = 0.4  # gram: PiSSA 0 to 0.2; CorDA, a principal part too, 0.9
ORTHOGONAL = 0.5  # cosines of A's rows, 1 where they are random: LoRA-GA from 0.1, a trained plain adapter above 0.8


def spread(paths: Sequence[str], count: int = SAMPLE) -> list[str]:
    """Return up to `count` of the paths, evenly spaced from the first on."""
    step = max(len(paths) / count, 1.0)
    return [paths[int(index * step)] for index in range(min(count, len(paths)))]


def sample(modules: Mapping[str, LoraFactors], base: BaseWeights) -> list[str]:
    """Return a few modules that are matrices in the base, evenly spaced; a large one only where all are large."""
    sizes: dict[str, int] = {}
    for path in modules:
        name = base.find(path)
        if name is not None and len(base.tensors.shape(name)) == 2:
            sizes[path] = _count(base.tensors.shape(name))
    small = [path for path, size in sizes.items() if size <= LARGE]
    return spread(small or list(sizes), SAMPLE if small else 1)


@dataclass(frozen=True)
class Halves:
    """Mean cosines of the first with the second half of A's rows, and of B's columns, the latter turned around."""

    rows: float
    columns: float
    modules: int

    @property
    def parallel(self) -> bool:
        """Whether this is [B, -B0] [A; A0], or [B, B0] [A; -A0]: a trained adapter less its initial one.

        LoRA-GA's B0 is small beside the trained B, so B's cosine (down to 0.1) says no more than the sign.
        """
        return abs(self.rows) >= PARALLEL and self.rows * self.columns > 0

    def __str__(self) -> str:
        cosines = f"{self.rows:.2f} (A) and {self.columns:.2f} (B)"
        return f"cosines of their halves {cosines}, in {counted(self.modules, 'module')}"


def halves(modules: Mapping[str, LoraFactors]) -> Halves | None:
    """Return the cosines of the halves, medians over the sampled modules of even rank; None where there is none."""
    of_A, of_B = [], []
    for path in spread(list(modules)):
        factors = modules[path]
        if factors.rank % 2:
            continue
        (A, A0), (B, B0) = factors.A.double().chunk(2), factors.B.double().chunk(2, dim=1)
        of_A.append(float(torch.cosine_similarity(A, A0, dim=1).mean()))
        of_B.append(-float(torch.cosine_similarity(B, B0, dim=0).mean()))
    return Halves(median(of_A), median(of_B), len(of_A)) if of_A else None


@dataclass(frozen=True)
class Projections:
    """How much an adapter is a part of W0. Medians over the sampled modules.

    on_rows, on_columns: cosine of s B A with W0 projected on A's rows, and on B's columns; 1 for any singular part of
    W0 (PiSSA, MiLoRA), the second alone for parts like OLoRA's Q_r Q_rᵀ W0. first: the share of W0's first r columns
    that lies in B's columns. energy: |W0 on A's rows|² against that of an average subspace: above 1 for a principal
    part. gram: |A Aᵀ - Bᵀ B| / (|A Aᵀ| + |Bᵀ B|), 0 for A = √S Vᵀ and B = U √S.
    """

    on_rows: float
    on_columns: float
    first: float
    energy: float
    gram: float
    modules: int

    @property
    def family(self) -> str | None:
        """The family whose initialisation leaves such an adapter, or None: nothing of W0 is in it."""
        if not max(self.on_rows, self.on_columns) >= NEAR:  # NaN neither: of numbers beyond all arithmetic
            return None
        if self.on_columns >= NEAR and self.first >= FIRST:
            return "olora"
        is_principal = self.on_rows >= NEAR and self.energy > 1 and self.gram < EVEN
        return "pissa" if is_principal else "residual"

    @property
    def strange(self) -> bool:
        return max(self.on_rows, self.on_columns) < STRANGE

    def __str__(self) -> str:
        cosines = f"cosine {self.on_rows:.2f} on its rows, {self.on_columns:.2f} on its columns"
        return f"B A against the base projected on it: {cosines}, in {counted(self.modules, 'module')}"


def projections(modules: Mapping[str, LoraFactors], base: BaseWeights) -> Projections | None:
    """Measure a sample of modules; None where the base has none of them as a matrix of the adapter's shape."""
    paths = [path for path in sample(modules, base) if _can_be_part(modules[path], base.shape(path))]
    rows = [_project(modules[path], base.weight(path).float()) for path in paths]
    if not rows:
        return None
    on_rows, on_columns, first, energy, gram = [median(column) for column in zip(*rows, strict=True)]
    return Projections(on_rows, on_columns, first, energy, gram, len(rows))


def _can_be_part(factors: LoraFactors, shape: tuple[int, int]) -> bool:
    """Of its shape, and with a rank below it: a projection on the whole space would say nothing."""
    return factors.shape == shape and factors.rank < min(shape)


def _project(factors: LoraFactors, W: Tensor) -> tuple[float, float, float, float, float]:
    """W is used up."""
    A, B = (_of_size_one(one) for one in (factors.A, factors.B))  # (r, in), (out, r)
    low, high = W.aminmax()
    W.div_(torch.maximum(-low, high).clamp(min=torch.finfo(W.dtype).tiny))
    V, U = torch.linalg.qr(A.T).Q, torch.linalg.qr(B).Q  # (in, r), (out, r)
    sign = 1.0 if factors.scale >= 0 else -1.0
    WV, head = W @ V, W[:, : factors.rank]  # (out, r), (out, r)
    energy = float(torch.linalg.vector_norm(WV) / torch.linalg.vector_norm(W)) ** 2 * W.shape[1] / factors.rank
    of_A, of_B = _gram(factors.A), _gram(factors.B.T)  # (r, r)
    return (
        sign * _cosine(B @ (A @ V), WV),
        sign * _cosine((U.T @ B) @ A, U.T @ W),
        float((U.T @ head).norm() / head.norm()),
        energy,
        float((of_A - of_B).norm() / (of_A.norm() + of_B.norm())),
    )


def _gram(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().T


def _of_size_one(factor: Tensor) -> Tensor:
    """Return a factor in float32, its largest value 1: its square is finite, and no cosine is another."""
    double = factor.double()
    return (double / double.abs().max().clamp(min=1e-300)).float()


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def orthogonality(modules: Mapping[str, LoraFactors]) -> float | None:
    """Return the root mean square cosine of A's rows times √in: about 1 for random rows, 0 for singular vectors.

    Training can only bring rows nearer to each other. The median over sampled modules of rank 4 and more, or None.
    """
    found = []
    for path in spread(list(modules)):
        A = modules[path].A.double()
        if A.shape[0] >= 4:
            unit = torch.nn.functional.normalize(A, dim=1)
            off = unit @ unit.T - torch.eye(len(unit), dtype=unit.dtype)  # (r, r)
            found.append(float(off.norm()) * (A.shape[1] / (len(unit) * (len(unit) - 1))) ** 0.5)
    return median(found) if found else None


def kinship(modules: Mapping[str, LoraFactors], initial: Mapping[str, LoraFactors]) -> float:
    """Return the mean cosine of A's rows with those of another adapter, over sampled modules; 0 where ranks differ."""
    found = [0.0]
    for path in spread(list(modules)):
        if path in initial and initial[path].A.shape == modules[path].A.shape:
            rows = torch.cosine_similarity(modules[path].A.double(), initial[path].A.double(), dim=1)
            found.append(float(rows.mean()))
    return sum(found) / max(len(found) - 1, 1)


def differs(base: BaseWeights, folder: Path, targets: Sequence[str]) -> str:
    """Compare samples of another model's weights with the base's: "nowhere", "targets", "everywhere", or "unreadable".

    targets: the adapter's modules. "targets": some of those differ, and nothing else does.
    """
    try:
        other = BaseWeights(folder)
    except GoraError:  # a quantized or an unfinished model, or no model: then it says nothing
        return "unreadable"
    names = {name for name in (base.find(path) for path in targets) if name is not None}
    others = [name for name, entry in base.tensors.entries.items() if name not in names and _count(entry.shape) < LARGE]
    same = _equal(base, other)
    if not all(same(name) for name in spread(others)):
        return "everywhere"
    return "nowhere" if all(same(name) for name in spread(sorted(names))) else "targets"


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _equal(base: BaseWeights, other: BaseWeights) -> Callable[[str], bool]:
    def same(name: str) -> bool:
        theirs = other.find_parameter(name)
        if theirs is None or other.tensors.shape(theirs) != base.tensors.shape(name):
            return False
        one, two = base.tensors[name], other.tensors[theirs]
        return torch.equal(one.to(two.dtype), two) or torch.equal(one, two.to(one.dtype))

    return same
