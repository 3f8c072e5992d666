"""The loss of a batch: the mean over the tokens that carry loss. Probe, search, training and evaluation share it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gora_serve.training.cross_entropy import cross_entropy
from gora_serve.training.encode import IGNORED

Batch = Mapping[str, Tensor]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss per token with loss, in float32.

    A batch with decoder_input_ids is an encoder-decoder's: its logits are aligned with its labels. A causal model
    predicts the next token; logits are asked for only at positions where some row of the batch predicts a token
    with loss: over a large vocabulary they are much of the time and most of the memory. The value is that of
    transformers' own loss.
    """
    logits, labels = _aligned(model, batch)
    return cross_entropy(logits, labels)


def scored(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (tokens, vocabulary) and labels (tokens,) of the tokens that carry loss, as for `mean_loss`."""
    logits, labels = _aligned(model, batch)
    carrying = labels != IGNORED
    return logits[carrying], labels[carrying]


def _aligned(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (positions, vocabulary) and what each predicts (positions,), IGNORED where it carries no loss."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = _predicted(batch)
    if "decoder_input_ids" in batch:
        logits = model(**inputs, use_cache=False).logits  # (batch, length of the labels, vocabulary)
        return logits.flatten(0, 1), labels.flatten()
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)  # (kept,)
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits  # (batch, kept, vocabulary)
    return logits.flatten(0, 1), labels[:, positions].flatten()


def loss_tokens(batch: Batch) -> int:
    """Return how many tokens carry loss."""
    return int((_predicted(batch) != IGNORED).sum())


def input_tokens(batch: Batch) -> Tensor:
    """Return how many tokens the model reads, without padding: those of an encoder-decoder's labels too. A scalar."""
    tokens = batch["attention_mask"].sum()
    return tokens + (batch["labels"] != IGNORED).sum() if "decoder_input_ids" in batch else tokens


def _predicted(batch: Batch) -> Tensor:
    """The labels as the logits are aligned: a causal model never predicts the first token."""
    return batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]
