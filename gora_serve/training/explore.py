"""GoRA-pro (the authors' answer to the reviewers): statistics along n steps of SGD on the weights themselves.

The weights move while the probe looks, and are put back bit for bit afterwards, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gora_serve.gora.statistics import Reduce
from gora_serve.training.weights import is_transposed


@dataclass(frozen=True)
class Explorer:
    """Exploratory steps on `modules`, from the weights `start` (copies on the CPU, as the modules keep them)."""

    modules: Mapping[str, nn.Module]
    totals: Mapping[str, Tensor]  # Σ over this process's steps of the gradient, (out, in), added to by the probe
    start: Mapping[str, Tensor]
    lr: float

    def step(self, reduce: Reduce, *, processes: int) -> None:
        """Set W = W_0 - lr Σ_j G_j, G_j the mean gradient of step j over processes.

        That is where n steps of plain SGD lead, without its rounding in between: the sum is in float32.
        """
        with torch.no_grad():
            for paths in _by_weight(self.modules):
                module = self.modules[paths[0]]
                first, *others = (self.totals[path] for path in paths)
                total = reduce(sum(others, start=first))  # (out, in)
                start = self.start[paths[0]].to(total.device, torch.float32)
                moved = total.T if is_transposed(module) else total
                _parameter(module).copy_(torch.sub(start, moved, alpha=self.lr / processes))

    def restore(self) -> None:
        with torch.no_grad():
            for path, module in self.modules.items():
                _parameter(module).copy_(self.start[path])


@contextmanager
def exploring(modules: Mapping[str, nn.Module], totals: Mapping[str, Tensor], *, lr: float) -> Iterator[Explorer]:
    """While open, the weights may move; on leaving they are what they were."""
    start = {path: _parameter(module).detach().cpu().clone() for path, module in modules.items()}
    explorer = Explorer(modules, totals, start, lr)
    try:
        yield explorer
    finally:
        explorer.restore()


def _by_weight(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """The paths of the modules, those that share one weight together."""
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(id(_parameter(module)), []).append(path)
    return list(paths.values())


def _parameter(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
