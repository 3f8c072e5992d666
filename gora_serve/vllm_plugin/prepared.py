"""The sum of a step of few tokens over packed weights: prepared once, made again and again.

While a batch decodes, every step asks each layer for a sum of the same adapters over as many tokens. The products take
microseconds, and to find out what is multiplied takes longer: that is kept, and memory for what lies between.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache

import torch

from gora_serve.vllm_plugin.kernel import operation
from gora_serve.vllm_plugin.packed import PackedRows, ready
from gora_serve.vllm_plugin.route import Route

FEW = 32  # tokens of a step, at most


class Prepared:
    """rows: of some adapters. tokens: at most FEW. exact: whether all of the rows' adapters are in the batch.

    Its memory is that of every layer of the same sizes: a process has one thread that computes.
    """

    def __init__(self, rows: PackedRows, tokens: int, *, exact: bool) -> None:
        self._rows, self._exact, self._multiply = rows, exact, operation()
        self._a = rows.take() if len(rows.a) == 1 else None
        self._columns = torch.cat([share.columns for share in rows.shares])
        self._owners = rows.owners[:, self._columns]
        self._h = _rows(tokens, rows.owners.shape[1], "h")  # (tokens, columns)
        self._used = _rows(tokens, self._columns.numel(), "used")  # those of the shares, one after the other: even
        spans = tuple((share.start, share.stop) for share in rows.shares)
        self._added = _rows(tokens, rows.out, (rows.out, spans))  # what no share writes stays zero
        own = self._used.split_with_sizes([share.columns.numel() for share in rows.shares], 1)
        self._parts = tuple(
            (self._added[:, share.start : share.stop], h, share, share.take() if share.pairs is None else None)
            for share, h in zip(rows.shares, own, strict=True)
        )
        self._masked: tuple[Route, torch.Tensor] | None = None

    def add(self, y: torch.Tensor, x: torch.Tensor, route: Route, scale: float) -> None:
        """Add to y (tokens, out) in place, for x (tokens, in). Raises ValueError for other sizes."""
        rows, used, multiply = self._rows, self._used, self._multiply
        rows.check(y)
        if not x.shape[0] == y.shape[0] == used.shape[0]:  # the kernel takes their number from x
            raise ValueError(f"x has {x.shape[0]} rows, y {y.shape[0]}; {used.shape[0]} are prepared")
        multiply(self._h, ready(x), rows.take() if self._a is None else self._a, None, True)
        torch.index_select(self._h, 1, self._columns, out=used)
        if not (self._exact and route.alone):
            used.masked_fill_(self._mask(route), 0)
        for part, h, share, weight in self._parts:
            multiply(part, h, share.take() if weight is None else weight, None, True)
        y.add_(self._added, alpha=scale)

    def _mask(self, route: Route) -> torch.Tensor:
        """Return where a column is not of a token's own adapter; a route is that of many steps."""
        if self._masked is None or self._masked[0] is not route:
            self._masked = route, route.slots != self._owners
        return self._masked[1]


def _rows(tokens: int, columns: int, use: Hashable) -> torch.Tensor:
    """Return (tokens, columns) of the memory that all of the same use have."""
    size = 1 << (FEW * columns - 1).bit_length()  # powers of 2: a few sizes for whatever adapters come
    return _memory(size, use)[: tokens * columns].view(tokens, columns)


@cache
def _memory(size: int, use: Hashable) -> torch.Tensor:
    with torch.inference_mode(False):  # else it could be written in that mode alone
        return torch.zeros(size, dtype=torch.bfloat16)
