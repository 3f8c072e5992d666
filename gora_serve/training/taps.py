"""Hooks on linear layers: each backward pass hands a layer's output gradient and its input to whoever asks.

The gradient of W is Σ dYᵀ X. `tapped` puts an identity behind every target's output whose backward pass hands
(dY, X) on. X is kept by autograd's own saved tensors, so gradient checkpointing recomputes it like any activation,
and no weight ever needs `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Receiver = Callable[[Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """Identity on Y. Its backward pass hands (dY, X) to the receiver."""

    @staticmethod
    def forward(ctx: Any, Y: Tensor, X: Tensor, anchor: Tensor, receive: Receiver) -> Tensor:
        ctx.save_for_backward(X)
        ctx.receive = receive
        if Y._is_view():
            return Y.clone()
        ctx.mark_dirty(Y)  # handed through as it is, without a copy; a model may go on to change it in place
        return Y

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

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def tap(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], Y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return Y
            (X, *_) = (*args, *named.values())
            anchor = torch.zeros((), device=Y.device, requires_grad=True)
            tapped_output: Tensor = _Tap.apply(Y, X.detach(), anchor, receivers[path])  # type: ignore[no-untyped-call]
            return tapped_output

        return tap

    handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
