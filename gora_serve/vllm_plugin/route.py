"""Which tokens of a batch belong to which adapter, worked out once for all layers of a step. No vLLM here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

Tokens = slice | torch.Tensor  # a range, or the numbers of tokens


@dataclass(frozen=True)
class Route:
    """slots: (tokens, 1), the slot of each token, -1 where it has no adapter. groups: the tokens of each slot that the
    batch has. alone: one adapter has all tokens.
    """

    slots: torch.Tensor
    groups: Mapping[int, Tokens]
    alone: bool

    @cached_property
    def tokens(self) -> int:
        return self.slots.shape[0]

    @cached_property
    def active(self) -> tuple[int, ...]:
        return tuple(self.groups)


def make_route(slots: torch.Tensor) -> Route:
    """Group the tokens of a batch. slots: (tokens,), a number below 0 for a token without an adapter."""
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    runs: dict[int, list[range]] = {}
    start = 0
    for slot, count in zip(values.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            runs.setdefault(slot, []).append(range(start, start + count))
        start += count
    groups = {slot: _tokens(found, slots.device) for slot, found in sorted(runs.items())}
    return Route(slots.unsqueeze(1), groups, alone=len(values) == 1 and bool(groups))


def _tokens(runs: list[range], device: torch.device) -> Tokens:
    if len(runs) == 1:
        return slice(runs[0].start, runs[0].stop)
    return torch.tensor([token for run in runs for token in run], device=device)
