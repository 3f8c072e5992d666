"""The values that flow through the whole tool: `LoraFactors` of one module, and the `Adapter` made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gora_serve.errors import InputError
from gora_serve.integrity.manifest import Roots


@dataclass(frozen=True)
class LoraFactors:
    """One module's update: delta = scale * B @ A, (out, in).

    A: (r, in). B: (out, r). The rank is A.shape[0]; it is never stored. Raises InputError if the shapes do not fit.
    """

    A: Tensor
    B: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] or self.rank == 0:
            raise InputError(
                "A and B do not belong together", code="GS-352",
                expected="A (r, in) and B (out, r) with r of at least 1",
                actual=f"A {tuple(self.A.shape)}, B {tuple(self.B.shape)}", hint="save the adapter again, whole",
            )  # fmt: skip

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    def delta(self) -> Tensor:
        """Return scale * B @ A, (out, in), in float64."""
        product: Tensor = self.scale * (self.B.double() @ self.A.double())
        return product


class LazyModules(Mapping[str, LoraFactors]):
    """Module path -> factors that are computed, or read, at each look-up and not kept: one module in memory at a time.

    Iteration is in the order of the paths given.
    """

    def __init__(self, paths: Iterable[str], factors: Callable[[str], LoraFactors]) -> None:
        self._paths = dict.fromkeys(paths)
        self._factors = factors

    def __getitem__(self, path: str) -> LoraFactors:
        if path not in self._paths:
            raise KeyError(path)
        return self._factors(path)

    def __contains__(self, path: object) -> bool:
        return path in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


@dataclass(frozen=True)
class BaseId:
    """Which base an adapter belongs to. `roots` is None where nobody has hashed it; `asserted` where a person said so
    (`bind`), and not the tool that made the adapter.
    """

    name: str
    revision: str | None = None
    roots: Roots | None = None
    asserted: bool = False


@dataclass(frozen=True)
class Adapter:
    """Updates by module path (the base model's own paths); a module without an update is absent.

    carried: PEFT's modules_to_save, kept verbatim: parameter path (score.weight) -> what replaces the base's tensor.
    origin: where the adapter comes from (method, data digest, settings). embeddings: those of the modules that are
    embeddings, whose weight (V, d) is the (out, in) of their factors. task_type and fan_in_fan_out are PEFT's words
    for the kind of model and for Conv1D's transposed weights.
    """

    modules: Mapping[str, LoraFactors]
    base: BaseId
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    task_type: str | None = "CAUSAL_LM"
    fan_in_fan_out: bool = False
    embeddings: frozenset[str] = frozenset()

    @property
    def ranks(self) -> dict[str, int]:
        return {path: factors.rank for path, factors in self.modules.items()}

    @property
    def parameters(self) -> int:
        return sum(factors.parameters for factors in self.modules.values())


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the elements as they lie in memory: row by row, little-endian."""
    data: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data
