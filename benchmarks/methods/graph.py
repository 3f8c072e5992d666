"""Training on CUDA with a step recorded once and replayed: the same kernels, without a launch for each of them.

The small base's steps are thousands of kernels of a few microseconds; launched one by one from Python they take ten
times as long as the device computes. All batches of a run are padded to one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gora_serve.training.encode import IGNORED
from gora_serve.training.session import LazyBatch

WARM_UP = 3


@dataclass(frozen=True)
class Batches:
    """All batches of a run: ids (steps, rows, length); labels (steps, rows, kept) of the positions (steps, kept) whose
    logits are asked for."""

    ids: Tensor
    labels: Tensor
    positions: Tensor

    @classmethod
    def of(cls, batches: Sequence[LazyBatch]) -> Batches:
        every = [batch() for batch in batches]
        shifted = [functional.pad(one["labels"][:, 1:], (0, 1), value=IGNORED) for one in every]
        positions = [(labels != IGNORED).any(dim=0).nonzero().squeeze(1) for labels in shifted]
        kept = [labels[:, places] for labels, places in zip(shifted, positions, strict=True)]
        return cls(stack([one["input_ids"] for one in every], 0), stack(kept, IGNORED), stack(positions, 0))


def stack(tensors: Sequence[Tensor], filler: int) -> Tensor:
    """Pad the last dimension to the longest and stack. Padding is on the right: no real token sees it."""
    longest = max(one.shape[-1] for one in tensors)
    return torch.stack([functional.pad(one, (0, longest - one.shape[-1]), value=filler) for one in tensors])


def train_recorded(
    model: nn.Module,
    batches: Sequence[LazyBatch],
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    *,
    extra: Callable[[], Tensor | None],
    after_step: Callable[[int], None],
) -> list[float]:
    """Take a step for each batch, of the learning rate peak * rates[step]; return the losses.

    extra: a term that is added to the loss. after_step gets the number of the step, with gradients in place.
    """
    every = Batches.of(batches)
    ids, labels, positions = every.ids[0].clone(), every.labels[0].clone(), every.positions[0].clone()
    length = ids.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
    for group in optimizer.param_groups:
        group.update(capturable=True, lr=torch.zeros((), device=ids.device))

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=positions).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        term = extra()
        (loss if term is None else loss + term).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose kernels; the learning rate is 0
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    recorded: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        loss = step()
    losses = torch.zeros(len(batches), device=ids.device)
    for number, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"].fill_(group["peak"] * rate)
        ids.copy_(every.ids[number])
        labels.copy_(every.labels[number])
        positions.copy_(every.positions[number])
        recorded.replay()
        losses[number].copy_(loss)
        after_step(number)
    optimizer.zero_grad(set_to_none=True)
    return losses.tolist()  # type: ignore[no-any-return]
