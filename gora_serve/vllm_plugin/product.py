"""y += x Aᵀ B of every token's own adapter, on CPU, over the weights of `pool`. No vLLM here.

Schemes, of which the cheapest one by number of tokens is taken (measured by `benchmarks/lora_schemes.py`):

- side by side: one product with the rows of all adapters in the batch, a mask that leaves each token those of its own
  adapter, and one product with their B. A handful of operations whatever the number of adapters: for few tokens.
- prepared: side by side over packed weights, for few tokens (`prepared`).
- by adapter: each adapter's tokens with its own rows. No wasted product: for many tokens.

Tokens without an adapter get nothing added, or zeros.
"""

from __future__ import annotations

import torch

from gora_serve.vllm_plugin.packed import PackedRows
from gora_serve.vllm_plugin.pool import RankPool, Selected
from gora_serve.vllm_plugin.prepared import FEW
from gora_serve.vllm_plugin.route import Route, Tokens

# Tokens not its own that an adapter's rows would meet side by side, from which "by adapter" is faster: below, its
# many small operations, and the copies of tokens that lie apart, cost more.
MANY, MANY_16_BIT, MANY_PACKED = 150, 500, 150


def add_linear(y: torch.Tensor, x: torch.Tensor, pool: RankPool, route: Route, scale: float = 1.0) -> None:
    """Add to y (tokens, out) in place. x: (tokens, in). out holds the slices of the pool one after the other."""
    if not route.groups:
        return
    if pool.packed and route.tokens <= FEW:
        prepared = pool.prepared(route.tokens, route.active)
        if prepared is not None:
            prepared.add(y, x, route, scale)
        return
    if _by_adapter(route, _many(pool, x)):
        for slot, tokens in route.groups.items():
            _add_one(y, x, pool, slot, tokens, scale)
        return
    found = pool.select(route.active)
    if found is not None:
        found.grow(y, _masked(found.shrink(x), found, route), scale)


def add_embedding(y: torch.Tensor, tokens: torch.Tensor, pool: RankPool, route: Route) -> None:
    """Add to y (tokens, out) in place. tokens: (tokens,), numbers of columns of A. Raises TypeError for packed rows."""
    found = pool.select(route.active) if route.groups else None
    if isinstance(found, PackedRows):
        raise TypeError("columns of packed rows cannot be picked")
    if found is not None:
        found.grow(y, _masked(found.pick(tokens, y.dtype), found, route), 1.0)


def _many(pool: RankPool, x: torch.Tensor) -> int:
    if pool.packed:
        return MANY_PACKED
    return MANY if x.dtype == torch.float32 else MANY_16_BIT


def _by_adapter(route: Route, many: int) -> bool:
    active = len(route.groups)
    if active == 1:
        return not route.alone
    return route.tokens * (active - 1) >= many * active


def _masked(h: torch.Tensor, found: Selected, route: Route) -> torch.Tensor:
    """Set to zero what is not of a token's own adapter in h (tokens, ranks or the columns of blocks)."""
    if not route.alone:
        h.masked_fill_(route.slots != found.owners, 0)
    return h


def _add_one(y: torch.Tensor, x: torch.Tensor, pool: RankPool, slot: int, tokens: Tokens, scale: float) -> None:
    found = pool.select((slot,))
    if found is None:
        return
    h = found.shrink(x[tokens])  # of its own tokens; a view of a range
    if isinstance(tokens, slice):
        found.grow(y[tokens], h, scale)
    else:
        added = torch.zeros(h.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
        found.grow(added, h, scale)
        y.index_add_(0, tokens, added)
