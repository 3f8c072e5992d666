"""The gradient probe: micro-batches through the frozen model, statistics of every target out.

Works on any `nn.Module` with linear layers; knows nothing of files, tokenizers or Accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from gora_serve.config import ProbeConfig, RankConfig
from gora_serve.errors import InputError, RunError
from gora_serve.gora.initialize import draw_A
from gora_serve.gora.settle import has_settled
from gora_serve.gora.sketch import PILOT_ROWS, SketchedGradient, draw_rows
from gora_serve.gora.statistics import ExactGradient, Gradient, GradientStatistics, ModuleStatistics, Reduce, alone
from gora_serve.progress import Listener, Progress, silent
from gora_serve.training.explore import Explorer, exploring
from gora_serve.training.taps import tapped
from gora_serve.training.targets import linear_modules
from gora_serve.training.weights import execution_device, weight_matrix, weight_shape

CHECK_EVERY = 4  # micro-batches between two looks at whether the ranks stand still

LossFunction = Callable[[nn.Module, Any], Tensor]
Count = Callable[[Any], tuple[int, int]]


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    rank_max: int | None = None,
    generator: torch.Generator | None = None,
    config: ProbeConfig | None = None,
    ranks: RankConfig | None = None,
    count_batch: Count = lambda batch: (0, 0),
    reduce: Reduce = alone,
    processes: int = 1,
    device: torch.device | None = None,
    listen: Listener = silent,
) -> GradientStatistics:
    """Measure the mean gradient of each module over micro-batches (algorithm 1, lines 2 to 8).

    loss_fn(model, batch) returns a scalar loss, already a mean over the batch. modules: by path, what to measure
    (every linear layer but the output head). rank_max: how many rows A_max gets, the largest rank that B can be
    made for. generator draws A_max, module by module, and the rows of a sketch. config.steps batches are used at
    most; "auto" stops at config.most_steps or once the ranks that `ranks` would give stand still. count_batch says
    how many samples and tokens a batch holds. `reduce` sums a tensor over `processes`; each gives its own batches
    and all get the same statistics. device: where sums are kept (where the weights are).

    Mode "exact" (and "auto") keeps one (out, in) float32 matrix a module; "sketch" keeps (rank_max, out) numbers
    and a sample of rows, and runs the first batch twice. Weights, requires_grad flags and training mode are left
    as they were. Raises InputError without batches or where no loss reaches any module, RunError for a loss that
    is not finite.
    """
    config, ranks = config or ProbeConfig(), ranks or RankConfig()
    config.validate()
    modules = linear_modules(model) if modules is None else modules
    generator = generator or torch.Generator().manual_seed(0)
    matrices = {path: draw_A(weight_shape(m), rank_max or ranks.highest, generator) for path, m in modules.items()}
    run = _Probe(model, loss_fn, modules, matrices, config, ranks, count_batch, reduce, processes, device, listen)
    with _frozen(model):
        if config.mode == "sketch":
            first, batches = _first_and_all(batches)
            return run.measure(batches, run.sketches(first, generator))
        return run.measure(batches, run.exact())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, no parameter asks for a gradient: none is made, and what lies in `.grad` stays as it is."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _first_and_all(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise _no_batch()
    return first, chain([first], rest)


@dataclass(frozen=True)
class _Probe:
    """One call of `probe`."""

    model: nn.Module
    loss_fn: LossFunction
    modules: Mapping[str, nn.Module]
    matrices: Mapping[str, Tensor]  # A_max by path, (k, in)
    config: ProbeConfig
    ranks: RankConfig
    count_batch: Count
    reduce: Reduce
    processes: int
    device: torch.device | None
    listen: Listener

    def exact(self) -> dict[str, Gradient]:
        return {
            path: ExactGradient(weight_shape(module), self.matrices[path], self.place(module))
            for path, module in self.modules.items()
        }

    def sketches(self, first: Any, generator: torch.Generator) -> dict[str, Gradient]:
        """Return sketches with rows chosen by what the first micro-batch shows."""
        pilots = {}
        for path, module in self.modules.items():
            shape = weight_shape(module)
            rows = draw_rows(torch.ones(shape[0]), PILOT_ROWS, generator)
            pilots[path] = SketchedGradient(shape, self.matrices[path], rows, self.place(module))
        with tapped(self.modules, {path: pilot.add for path, pilot in pilots.items()}), torch.enable_grad():
            self.backward(first, step=1)
        sketches: dict[str, Gradient] = {}
        for path, module in self.modules.items():
            pilot = pilots.pop(path)
            rows = pilot.choose_rows(
                weight_matrix(module), error=self.config.error, generator=generator, reduce=self.reduce
            )
            sketches[path] = SketchedGradient(pilot.shape, pilot.A, rows, self.place(module))
        return sketches

    def place(self, module: nn.Module) -> torch.device:
        if self.device is not None:
            return self.device
        return execution_device(module)

    def measure(self, batches: Iterable[Any], gradients: dict[str, Gradient]) -> GradientStatistics:
        """Run the batches and turn what the gradients saw into statistics."""
        sums = torch.zeros(4, dtype=torch.float64)  # steps, samples, tokens, loss
        checks: list[Mapping[str, float]] = []  # importances at each look
        stopped = False
        receivers = {path: gradient.add for path, gradient in gradients.items()}
        most = self.config.most_steps
        with self.explorer(gradients) as explorer:
            for step, batch in enumerate(islice(batches, most), start=1):
                with tapped(self.modules, receivers), torch.enable_grad():
                    loss = self.backward(batch, step=step)
                sums += torch.tensor([1, *self.count_batch(batch), loss], dtype=torch.float64)
                self.listen(Progress("probe", step, most, {"loss": loss}))
                if explorer:
                    explorer.step(self.reduce, processes=self.processes)
                if self.looks(step):
                    checks.append(self.importances(gradients, step * self.processes))
                    stopped = has_settled(checks, self.shapes, self.ranks)
                if stopped:
                    break
        steps, samples, tokens, loss = (float(value) for value in self.reduce(sums))
        if not steps:
            raise _no_batch()
        results = {}
        for path, module in self.modules.items():
            gradient = gradients.pop(path)
            results[path] = gradient.finish(
                weight_matrix(module), self.config.importance, count=int(steps), reduce=self.reduce
            )
        _check_reached(results)
        mode = "sketch" if self.config.mode == "sketch" else "exact"
        return GradientStatistics(mode, results, int(steps), int(samples), int(tokens), loss / steps, stopped)

    def backward(self, batch: Any, *, step: int) -> float:
        loss = self.loss_fn(self.model, batch)
        _check_loss(loss, self.reduce, step)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def explorer(self, gradients: Mapping[str, Gradient]) -> AbstractContextManager[Explorer | None]:
        if not self.config.lr:
            return nullcontext()
        totals = {path: g.total for path, g in gradients.items() if isinstance(g, ExactGradient)}
        return exploring(self.modules, totals, lr=self.config.lr)

    def looks(self, step: int) -> bool:
        """Return whether after this step a probe that may stop early looks at its importances."""
        may_stop = self.config.steps == "auto" and step < self.config.most_steps
        return may_stop and (step * self.processes) % CHECK_EVERY < self.processes

    def importances(self, gradients: Mapping[str, Gradient], count: int) -> dict[str, float]:
        metric = self.config.importance[0]
        return {
            path: gradients[path].importance(weight_matrix(module), metric, count=count, reduce=self.reduce)
            for path, module in self.modules.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {path: weight_shape(module) for path, module in self.modules.items()}


def _no_batch() -> InputError:
    return InputError("the probe got no batch", code="GS-370", hint="give more data or a smaller --batch-size")


def _check_loss(loss: Tensor, reduce: Reduce, step: int) -> None:
    """Stop all processes at once where the loss of one of them is not finite."""
    if reduce(torch.isfinite(loss.detach()).logical_not().to(torch.float32).cpu()) > 0:
        raise RunError(
            f"the loss of probe step {step} is {float(loss.detach())}", code="GS-701", kept="no adapter was written",
            hint="look at the data of that step; try --dtype float32",
        )  # fmt: skip


def _check_reached(results: Mapping[str, ModuleStatistics]) -> None:
    unreached = [path for path, module in results.items() if not module.compressed.any()]
    if len(unreached) == len(results):
        raise InputError(
            "no gradient reached any target", code="GS-371", tensor=unreached[0],
            hint="the loss must depend on the targets, and some token must carry loss",
        )  # fmt: skip
