"""The two orders of the rows of queries and keys: RoPE rotates rows i and i + d / 2 of a head, or neighbors.

transformers has the halves; Meta's own code, torchtune and llama.cpp have neighbors. Pure.
"""

from __future__ import annotations

from torch import Tensor


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Return rows (out, n) with the two halves of each head as neighbors: row (head, half, i) goes to (head, i, half).

    LlamaModel.permute of llama.cpp's converter. heads: 0 leaves them as they are.
    """
    return _moved(rows, heads, 2, rows.shape[0] // heads // 2) if heads else rows


def separate(rows: Tensor, heads: int) -> Tensor:
    """Return rows (out, n) in halves, the inverse of `interleave`: row 2 i + j of a head goes to j d / 2 + i."""
    return _moved(rows, heads, rows.shape[0] // heads // 2, 2) if heads else rows


def _moved(rows: Tensor, *shape: int) -> Tensor:
    return rows.reshape(*shape, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
