"""Gradients of frozen weights, without asking autograd for one: hooks see each layer's input and output gradient.

The gradient of W is Σ dYᵀ X. `tapped` puts an identity behind every target's output whose backward pass hands
(dY, X) to the module's statistic. X is kept by autograd's own saved tensors, so gradient checkpointing recomputes
it like any activation, and no weight ever needs `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gora_serve.config import ProbeConfig
from gora_serve.errors import InputError, RunError
from gora_serve.gora.initialize import draw_A
from gora_serve.gora.statistics import ExactGradient, GradientStatistics, finish
from gora_serve.progress import Listener, Progress, silent
from gora_serve.training.weights import weight_matrix

Receiver = Callable[[Tensor, Tensor], None]
Reduce = Callable[[Tensor], Tensor]


class _Tap(torch.autograd.Function):
    """Identity on Y. Its backward pass hands (dY, X) to the receiver."""

    @staticmethod
    def forward(ctx: Any, Y: Tensor, X: Tensor, anchor: Tensor, receive: Receiver) -> Tensor:
        ctx.save_for_backward(X)
        ctx.receive = receive
        return Y.clone()  # not a view: some models go on to change a layer's output in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (dY,) = grads
        (X,) = ctx.saved_tensors
        ctx.receive(dY, X)
        return dY, None, None, None


@contextmanager
def tapped(modules: Mapping[str, nn.Module], receivers: Mapping[str, Receiver]) -> Iterator[None]:
    """While open, each backward pass calls receivers[path](dY, X) for every use of modules[path].

    X: (..., in), dY: (..., out), in the dtype of the forward pass. The anchor makes gradients flow from the
    first target on although everything is frozen; layers before it cost nothing.
    """

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def tap(_module: nn.Module, inputs: tuple[Any, ...], Y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return Y
            anchor = torch.zeros((), device=Y.device, requires_grad=True)
            tapped_output: Tensor = _Tap.apply(Y, inputs[0].detach(), anchor, receivers[path])  # type: ignore[no-untyped-call]
            return tapped_output

        return tap

    handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    modules: Mapping[str, nn.Module],
    rank_max: int,
    generator: torch.Generator,
    config: ProbeConfig | None = None,
    count_batch: Callable[[Any], tuple[int, int]] = lambda batch: (0, 0),
    reduce: Reduce = lambda tensor: tensor,
    listen: Listener = silent,
) -> GradientStatistics:
    """Measure the mean gradient of each module over micro-batches (algorithm 1, lines 2 to 8), mode exact.

    loss_fn(model, batch) returns a scalar loss, already a mean over the batch. At most config.steps batches are
    used. count_batch says how many samples and tokens a batch holds. `reduce` sums a tensor over processes; with
    several processes each gives its own batches and all get the same statistics. `generator` draws A_max
    (rank_max rows), module by module in the order of `modules`. Weights, requires_grad flags and training mode
    are left as they were. Raises InputError without batches or where no loss reaches any module, RunError for a
    loss that is not finite.
    """
    config = config or ProbeConfig()
    gradients = {path: _accumulator(module) for path, module in modules.items()}
    counts = torch.zeros(3, dtype=torch.float64)  # steps, samples, tokens
    losses = torch.zeros(1, dtype=torch.float64)
    with tapped(modules, {path: gradient.add for path, gradient in gradients.items()}), torch.enable_grad():
        for step, batch in enumerate(_first(batches, config.steps), start=1):
            loss = loss_fn(model, batch)
            _check_loss(loss, reduce, step)
            loss.backward()  # type: ignore[no-untyped-call]
            losses += float(loss.detach())
            counts += torch.tensor([1, *count_batch(batch)], dtype=torch.float64)
            listen(Progress("probe", step, config.steps, {"loss": float(loss.detach())}))
    counts, losses = reduce(counts), reduce(losses)
    if not counts[0]:
        raise InputError("the probe got no batch", code="GS-370", hint="give more data or a smaller --batch-size")
    results = {}
    for path, module in modules.items():
        A = draw_A(tuple(weight_matrix(module).shape), rank_max, generator)  # type: ignore[arg-type]
        total = reduce(gradients.pop(path).total)
        results[path] = finish(total, weight_matrix(module), A, count=int(counts[0]), metrics=config.importance)
    _check_reached(results)
    steps, samples, tokens = (int(value) for value in counts)
    return GradientStatistics(config.mode, results, steps, samples, tokens, float(losses[0]) / steps)


def _accumulator(module: nn.Module) -> ExactGradient:
    weight = weight_matrix(module)
    return ExactGradient((weight.shape[0], weight.shape[1]), weight.device)


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for index, batch in enumerate(batches):
        if index == count:
            return
        yield batch


def _check_loss(loss: Tensor, reduce: Reduce, step: int) -> None:
    """Stop all processes at once where the loss of one of them is not finite."""
    if reduce(torch.isfinite(loss.detach()).logical_not().to(torch.float32).cpu()) > 0:
        raise RunError(
            f"the loss of probe step {step} is {float(loss.detach())}", code="GS-701", kept="no adapter was written",
            hint="look at the data of that step; try --dtype float32",
        )  # fmt: skip


def _check_reached(results: Mapping[str, Any]) -> None:
    unreached = [path for path, module in results.items() if module.gradient_norm == 0.0]
    if len(unreached) == len(results):
        raise InputError(
            "no gradient reached any target", code="GS-371", tensor=unreached[0],
            hint="the loss must depend on the targets, and some token must carry loss",
        )  # fmt: skip
