"""Cross entropy over a large vocabulary, row by row, without float32 copies of the logits.

torch's own goes from bfloat16 logits over a float32 copy, its log-softmax and two gradients: more memory than many
a model's weights. Here a few rows at a time are in float32, and what is kept is the gradient, in the logits' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gora_serve.training.encode import IGNORED

HEADROOM = 2.0**15  # float16 keeps the gradient times this: undivided, it would vanish below 6e-8
CHUNK = 2**22  # logits in float32 at a time: 16 MiB. Smaller chunks are slower where the cores are busy


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over the rows whose label is not IGNORED, a scalar in float32.

    logits: (rows, vocabulary); labels: (rows,), whole numbers. Value and gradient are those of
    `torch.nn.functional.cross_entropy(logits.float(), labels)`; the gradient is rounded to the logits' dtype once,
    and again where the loss is multiplied on its way, as every gradient is (in float16 always: there it is kept
    enlarged, so that a loss scaler has something to scale). It is computed together with the value,
    and takes no other memory than one tensor like the logits, which backward scales in place: so backward goes
    through it once, and raises RuntimeError the second time. NaN where no row carries loss. float64 stays float64.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
        return loss
    return _mean_loss(logits, labels, None, 1.0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        every = bool((labels != IGNORED).all())
        gradient = torch.empty_like(logits) if every else torch.zeros_like(logits)  # (rows, vocabulary)
        ctx.factor = _factor(labels, logits.dtype)
        loss = _mean_loss(logits, labels, gradient, 1 / ctx.factor)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0] * ctx.factor), None


def _factor(labels: Tensor, dtype: torch.dtype) -> float:
    """What the kept gradient is to be multiplied by."""
    return 1 / (HEADROOM * max(1, int((labels != IGNORED).sum()))) if dtype == torch.float16 else 1.0


def _mean_loss(logits: Tensor, labels: Tensor, gradient: Tensor | None, times: float) -> Tensor:
    """Return the mean loss; write its gradient, multiplied, into `gradient`, at the rows that carry loss."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    carrying = (labels != IGNORED).nonzero().squeeze(1)  # (rows with loss,)
    every = len(carrying) == len(labels)  # then slices do, which copy nothing
    size = max(1, CHUNK // logits.shape[1])
    losses = [torch.zeros(0, dtype=precise, device=logits.device)]
    for start in range(0, len(carrying), size):
        rows = carrying[start : start + size]
        part = logits[start : start + size] if every else logits.index_select(0, rows)  # (chunk, vocabulary)
        target = labels[rows].unsqueeze(1)  # (chunk, 1)
        logs = torch.log_softmax(part.to(precise), dim=1)  # (chunk, vocabulary)
        losses.append(-logs.gather(1, target).squeeze(1))
        if gradient is None:
            continue
        slope = logs.exp_()
        slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=precise))
        slope.mul_(times / len(carrying))
        if every:
            gradient[start : start + size] = slope
        else:
            gradient.index_copy_(0, rows, slope.to(gradient.dtype))
    return torch.cat(losses).mean()
