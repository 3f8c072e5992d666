"""The loss of a batch: the mean over the tokens that carry loss. Probe, search, training and evaluation share it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gora_serve.training.cross_entropy import cross_entropy
from gora_serve.training.encode import IGNORED

Batch = Mapping[str, Tensor]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss per token with loss, in float32.

    Logits are asked for only at positions where some row of the batch predicts a token with loss: over a large
    vocabulary they are much of the time and most of the memory. The value is that of transformers' own loss.
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # (kept,)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits  # (batch, kept, vocabulary)
    return cross_entropy(logits.flatten(0, 1), labels[:, positions].flatten())


def loss_tokens(batch: Batch) -> int:
    """Return how many tokens carry loss: labels shifted by one, as causal models do."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
