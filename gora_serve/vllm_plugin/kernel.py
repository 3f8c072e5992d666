"""vLLM's own CPU kernel for small products of bfloat16 (`weight_packed_linear`), and the layout of its weights.

PyTorch's products of bfloat16 take 15 microseconds to begin, and a quarter of a millisecond for a new shape; those of
float32 need converted weights. This one begins in 5, takes 0.1 ms for a new shape of more than 4 tokens, and reads
weights as they lie. What it computes is rounded to bfloat16.

It takes a weight (n, k) in blocks of 32 outputs, the last of 16 or 32; in a block, pairs of inputs lie together:
(k / 2, 32, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

BLOCK, TILE = 32, 16  # outputs of a block, and of the smallest one


def multiply(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Write x (tokens, k) times a packed weight (n, k) into out (tokens, n).

    Rows of x and out may lie apart, those of x by an even number: for an odd one the kernel answers wrong. It looks at
    neither size of out.
    """
    operation()(out, x, weight, None, True)


@cache
def operation() -> Callable[..., Any]:
    """Return the kernel as PyTorch knows it: (out, x, weight, None, True), as for `multiply`."""
    return torch.ops._C.weight_packed_linear.default


def can_pack(wide: int, outs: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a layer of these sizes can be packed, and this processor's vLLM has the kernel."""
    return fits_layout(wide, outs, dtype, device) and has_kernel()


def fits_layout(wide: int, outs: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> bool:
    sizes = wide % 2 == 0 and all(out % BLOCK == 0 for out in outs)
    return sizes and dtype == torch.bfloat16 and torch.device(device).type == "cpu"


def has_kernel() -> bool:
    """Whether vLLM's kernel is there, this processor multiplies bfloat16, and small products come out right."""
    return hasattr(torch.ops._C, "weight_packed_linear") and torch.cpu._is_avx512_bf16_supported() and _multiplies()


@cache
def _multiplies() -> bool:
    """Try what the kernel has ways of its own for: few and many tokens, blocks of 16 and 32, odd numbers of pairs."""
    for tokens, n, k in ((3, TILE, 6), (3, BLOCK + TILE, 34), (40, TILE, 2), (40, BLOCK + TILE, 34)):
        # Whole numbers: exact in bfloat16. Rows that lie apart, as some are.
        x = (torch.arange(tokens * (k + 2)) % 7 - 3).to(torch.bfloat16).view(tokens, k + 2)[:, 2:]
        weight = (torch.arange(n * k) % 5 - 2).to(torch.bfloat16).view(n, k)
        y = torch.zeros(tokens, n + 3, dtype=torch.bfloat16)
        try:
            multiply(y[:, 1 : n + 1], x, pack_outputs(weight).view(n, k))
        except RuntimeError:
            return False
        right = (x.float() @ weight.float().t()).to(torch.bfloat16)
        if not torch.equal(y, torch.nn.functional.pad(right, (1, 2))):
            return False
    return True


def pack_outputs(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight (n, k), n divided by 16 and k even, in the kernel's layout, flat."""
    full = weight.shape[0] // BLOCK * BLOCK
    return torch.cat([_pack_blocks(weight[:full], BLOCK), _pack_blocks(weight[full:], TILE)])


def unpack_outputs(packed: torch.Tensor, wide: int) -> torch.Tensor:
    """Return the weight (n, k) that `pack_outputs` was given. wide: k."""
    full = packed.numel() // (BLOCK * wide) * BLOCK * wide
    parts = [
        part.view(-1, wide // 2, count, 2).transpose(1, 2).reshape(-1, wide)
        for part, count in ((packed[:full], BLOCK), (packed[full:], TILE))
    ]
    return torch.cat(parts)


def pack_inputs(ranks: Sequence[torch.Tensor], out: int) -> torch.Tensor:
    """Return the B of some adapters, each (r, out), as (out / 32, pairs, 32, 2)."""
    even = [to_height([b], b.shape[0] + b.shape[0] % 2, out) for b in ranks]
    joined = to_height(even, sum(b.shape[0] for b in even), out)
    return joined.view(-1, 2, out // BLOCK, BLOCK).permute(2, 0, 3, 1).contiguous()


def unpack_inputs(packed: torch.Tensor) -> torch.Tensor:
    """Return B (2 * pairs, out) of what `pack_inputs` made."""
    return packed.permute(1, 3, 0, 2).reshape(2 * packed.shape[1], packed.shape[0] * packed.shape[2])


def _pack_blocks(weight: torch.Tensor, count: int) -> torch.Tensor:
    return weight.reshape(-1, count, weight.shape[1] // 2, 2).transpose(1, 2).reshape(-1)


def to_height(rows: Sequence[torch.Tensor], height: int, wide: int) -> torch.Tensor:
    """Return rows one after the other, with zeros up to a height."""
    missing = height - sum(part.shape[0] for part in rows)
    return torch.cat([*rows, torch.zeros(missing, wide, dtype=torch.bfloat16)])
