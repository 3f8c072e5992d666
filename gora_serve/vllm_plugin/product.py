"""y += x Aᵀ B of every token's own adapter, on CPU, over the weights of `pool`. No vLLM here.

Two schemes, of which the cheaper one by number of tokens is taken (measured by `benchmarks/lora_schemes.py`):

- side by side: one product with the rows of all adapters in the batch, a mask that leaves each token those of its own
  adapter, and one product with their B. A handful of operations whatever the number of adapters: for few tokens.
- by adapter: each adapter's tokens with its own rows. No wasted product: for many tokens.

Tokens without an adapter get nothing added, or zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from gora_serve.vllm_plugin.pool import RankPool, Selected
from gora_serve.vllm_plugin.route import Route, Tokens

# Tokens not its own that an adapter's rows would meet side by side, from which the second scheme is faster: below, its
# many small operations cost more. Those of 16 bits have a longer start.
MANY, MANY_16_BIT = 150, 500
# Up to so many tokens a product of 16-bit numbers is slower than converting the weights and multiplying in float32.
FEW = 32
# From the rows of A (ranks, in) to the ranks of each token (tokens, ranks).
Shrink = Callable[[torch.Tensor], torch.Tensor]


def add_linear(y: torch.Tensor, x: torch.Tensor, pool: RankPool, route: Route, scale: float = 1.0) -> None:
    """Add to y (tokens, out) in place. x: (tokens, in). out holds the slices of the pool one after the other."""
    if not route.groups:
        return
    if _by_adapter(route, MANY if x.dtype == torch.float32 else MANY_16_BIT):
        for slot, tokens in route.groups.items():
            _add_one(y, x, pool, slot, tokens, scale)
    else:
        _add_all(y, pool, route, lambda a: _shrink(x, a), scale)


def add_embedding(y: torch.Tensor, tokens: torch.Tensor, pool: RankPool, route: Route) -> None:
    """Add to y (tokens, out) in place. tokens: (tokens,), numbers of columns of A."""
    if route.groups:
        _add_all(y, pool, route, lambda a: _pick(a, tokens, y.dtype), 1.0)


def _by_adapter(route: Route, many: int) -> bool:
    active = len(route.groups)
    if active == 1:
        return not route.alone or route.tokens > FEW
    return route.tokens * (active - 1) >= many * active


def _add_all(y: torch.Tensor, pool: RankPool, route: Route, shrink: Shrink, scale: float) -> None:
    found = pool.select(route.active)
    if found is None:
        return
    h = shrink(found.a.take())  # (tokens, ranks)
    if not route.alone:
        h.masked_fill_(route.slots != found.owners, 0)
    _scale(h, scale)
    _grow(y, h, pool, found)


def _add_one(y: torch.Tensor, x: torch.Tensor, pool: RankPool, slot: int, tokens: Tokens, scale: float) -> None:
    found = pool.select((slot,))
    if found is None:
        return
    mine = x[tokens]  # (own tokens, in); a view of a range
    h = _shrink(mine, found.a.take())  # (own tokens, ranks)
    _scale(h, scale)
    if isinstance(tokens, slice):
        _grow(y[tokens], h, pool, found)
    else:
        share = torch.zeros(h.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
        _grow(share, h, pool, found)
        y.index_add_(0, tokens, share)


def _shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return x (tokens, in) times Aᵀ, A (ranks, in)."""
    dtype = _dtype(a, x.shape[0], x.dtype)
    return torch.mm(x.to(dtype), a.to(dtype).t())


def _pick(a: torch.Tensor, tokens: torch.Tensor, ends: torch.dtype) -> torch.Tensor:
    """Return the columns of A (ranks, vocabulary) of some tokens, (tokens, ranks)."""
    return a.index_select(1, tokens).t().to(_dtype(a, tokens.shape[0], ends))


def _grow(y: torch.Tensor, h: torch.Tensor, pool: RankPool, found: Selected) -> None:
    """Add h (tokens, ranks) times B to y (tokens, out) in place, in the dtype of h, rounded to that of y once."""
    target = y if y.dtype == h.dtype else torch.zeros(y.shape, dtype=h.dtype, device=y.device)
    outs = target.split_with_sizes(pool.outs, 1)
    for index, part, b in zip(found.slices, h.split_with_sizes(found.ranks, 1), found.b, strict=True):
        outs[index].addmm_(part, b.take().to(h.dtype))
    if target is not y:
        y.add_(target)


def _scale(h: torch.Tensor, scale: float) -> None:
    if scale != 1.0:
        h.mul_(scale)


def _dtype(weight: torch.Tensor, tokens: int, ends: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in: the wider of the weight's and that of the layer's ends, or float32 where that is
    faster.
    """
    wide = torch.promote_types(weight.dtype, ends)
    return torch.float32 if tokens <= FEW or not has_products(wide) else wide


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has fast products of a dtype. Without them, PyTorch's are 10 times slower than float32."""
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype == torch.float32 or (dtype in known and bool(known[dtype]()))
