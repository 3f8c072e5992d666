"""vLLM's Punica wrapper for CPU, over pools: what the layers call with a batch's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from gora_serve.vllm_plugin.pool import PooledStack, RankPool
from gora_serve.vllm_plugin.product import add_embedding, add_linear
from gora_serve.vllm_plugin.route import Route, make_route


class PooledPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    """Takes the pool that the layer's stack carries; layers without one get vLLM's own way, without its index -1."""

    _route: Route | None = None  # of the tokens
    _sampled: Route | None = None  # of the rows that logits are made of
    _first: int | None = None  # the token of the first row, where logits are made of consecutive tokens

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._route = self._sampled = None

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add to y (tokens, out) in place, for x (tokens, in)."""
        if not isinstance(lora_a_stacked, PooledStack):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        self.add_pooled_linear(y, x, lora_a_stacked.pool, scale)

    def add_pooled_linear(self, y: torch.Tensor, x: torch.Tensor, pool: RankPool, scale: float = 1.0) -> None:
        """Add to y (tokens, out) in place, for x (tokens, in)."""
        add_linear(y, x, pool, self._of_tokens(x.shape[0]), scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Add to y (rows, vocabulary and its padding) in place, for x (rows, in)."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if not isinstance(lora_a_stacked, PooledStack):
            bare = self.sampler_indices < 0
            before = y[bare]
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
            y[bare] = before
            return
        pool = lora_a_stacked.pool
        add_linear(y[:, : sum(pool.outs)], x, pool, self._of_rows(x.shape[0]), scale)

    def add_pooled_embedding(self, y: torch.Tensor, tokens: torch.Tensor, pool: RankPool) -> None:
        """Add to y (tokens, out) in place, for the numbers of the tokens (tokens,)."""
        add_embedding(y.view(-1, y.shape[-1]), tokens.flatten(), pool, self._of_tokens(tokens.numel()))

    def add_shrink(self, y: Any, x: torch.Tensor, lora_a_stacked: Any, scale: float, **kwargs: Any) -> None:
        """vLLM's own, for layers without a pool; tokens without an adapter get zeros, not the last slot's A."""
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        bare = self.token_lora_indices < 0
        for one in y:
            one[: bare.shape[0]][bare] = 0

    @contextmanager
    def logits_of_tokens(self, first: int) -> Iterator[None]:
        """Inside, logits are made of consecutive tokens, this one the first, instead of what is sampled from."""
        self._first = first
        try:
            yield
        finally:
            self._first = None

    def _of_tokens(self, count: int) -> Route:
        if self._route is None or self._route.tokens != count:
            self._route = make_route(_exactly(self.token_lora_indices, count, self.indices_len[0]))
        return self._route

    def _of_rows(self, count: int) -> Route:
        if self._first is not None:
            return make_route(_exactly(self.token_lora_indices[self._first :], count, self.indices_len[0]))
        if self._sampled is None or self._sampled.tokens != count:
            self._sampled = make_route(_exactly(self.sampler_indices, count, self.indices_len[1]))
        return self._sampled


def _exactly(slots: torch.Tensor, count: int, told: int | None) -> torch.Tensor:
    """Return the first `count` slots; padding, and all before vLLM has told any, have no adapter."""
    found = slots[: 0 if told is None else count]
    missing = count - found.shape[0]
    return found if missing == 0 else torch.cat([found, found.new_full((missing,), -1)])
