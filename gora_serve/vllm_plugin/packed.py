"""A layer's adapters in the layout of vLLM's kernel for small products (`kernel`).

A is filled up with zeros to a number of rows that 16 divides, and an adapter's B to an even number of ranks. What is
computed is rounded to bfloat16: h, and the sum for y.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gora_serve.vllm_plugin.kernel import (
    BLOCK,
    TILE,
    multiply,
    pack_inputs,
    pack_outputs,
    to_height,
    unpack_inputs,
    unpack_outputs,
)  # fmt: skip

CHUNK = 256  # tokens that are added at once: the sum of a linear layer then stays in the processor's cache
NOBODY = -2  # owner of a row that is read and not asked for; no token has this slot
Factors = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # slice -> A (r, in), B (r, out)


@dataclass(frozen=True)
class Share:
    """A slice's part. columns: of h, those of its ranks. b: (blocks, pairs, 32, 2). pairs: those of b, None for all.
    start, stop: of y.
    """

    columns: torch.Tensor
    b: torch.Tensor
    pairs: torch.Tensor | None
    start: int
    stop: int

    def take(self) -> torch.Tensor:
        """Return the weight (out, ranks), in the kernel's layout: a view of all pairs, or a copy of some."""
        b = self.b if self.pairs is None else self.b.index_select(1, self.pairs)
        return b.view(self.stop - self.start, -1)


@dataclass(frozen=True)
class PackedRows:
    """The rows of some adapters. a: the blocks of A that have them, flat, in one piece or several. wide: in. out: of
    all slices. owners: (1, columns), the slot of each column of h, or NOBODY.
    """

    a: tuple[torch.Tensor, ...]
    wide: int
    out: int
    owners: torch.Tensor
    shares: tuple[Share, ...]

    @property
    def whole(self) -> bool:
        """Whether the shares are all of y."""
        return sum(share.stop - share.start for share in self.shares) == self.out

    def take(self) -> torch.Tensor:
        """Return A (columns of h, in), in the kernel's layout: a view of one piece, or a copy of several."""
        return (self.a[0] if len(self.a) == 1 else torch.cat(self.a)).view(-1, self.wide)

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (tokens, in) times Aᵀ: (tokens, columns)."""
        a = self.take()
        h = torch.empty(x.shape[0], a.shape[0], dtype=a.dtype)
        multiply(h, ready(x), a)
        return h

    def grow(self, y: torch.Tensor, h: torch.Tensor, scale: float) -> None:
        """Add scale times h (tokens, columns) times B to y (tokens, out). Raises ValueError for another out."""
        self.check(y)
        weights = [share.take() for share in self.shares]
        make = torch.empty if self.whole else torch.zeros
        for y_rows, h_rows in zip(_chunks(y), _chunks(h), strict=True):
            added = make(y_rows.shape, dtype=h.dtype)
            for share, weight in zip(self.shares, weights, strict=True):
                multiply(added[:, share.start : share.stop], h_rows.index_select(1, share.columns), weight)
            y_rows.add_(added, alpha=scale)

    def check(self, y: torch.Tensor) -> None:
        """Raise ValueError for y of another width: the kernel does not look, and writes beyond it."""
        if y.shape[1] != self.out:
            raise ValueError(f"y has {y.shape[1]} columns, the layer {self.out}")


@dataclass(frozen=True)
class Place:
    """Where an adapter lies: the rows of A and the pairs of B, by slice."""

    rows: Mapping[int, range]
    pairs: Mapping[int, range]


class PackedStore:
    """All adapters of a layer, in the order of `_places`, made anew when one comes or goes.

    A: the rows of each adapter, by slice. B: for each slice (out / 32, pairs, 32, 2).
    """

    def __init__(self, wide: int, outs: Sequence[int]) -> None:
        self._wide, self._outs = wide, tuple(outs)
        self._pack({})

    @property
    def held_bytes(self) -> int:
        return self._a.nbytes + sum(b.nbytes for b in self._b)

    def put(self, slot: int, factors: Factors) -> None:
        """Take in an adapter. factors: A (r, <= in) and B (r, <= out) of the slices that it has."""
        new = {index: (_to_width(a, self._wide), _to_width(b, self._outs[index])) for index, (a, b) in factors.items()}
        self._pack(self._held() | {slot: new})

    def remove(self, slot: int) -> None:
        self._pack({number: factors for number, factors in self._held().items() if number != slot})

    def part(self, slot: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of one adapter's A (r, in) and B (r, out) of a slice that it has."""
        return self._held()[slot][index]

    def select(self, slots: Sequence[int]) -> PackedRows | None:
        """Return what has the ranks of these adapters; None for none at all."""
        chosen = {slot: self._places[slot] for slot in slots if slot in self._places}
        owner = {row: slot for slot, place in chosen.items() for rows in place.rows.values() for row in rows}
        if not owner:
            return None
        blocks = sorted({row // BLOCK for row in owner})
        covered = [row for block in blocks for row in range(BLOCK * block, min(BLOCK * (block + 1), self._height))]
        column = {row: number for number, row in enumerate(covered)}
        shares = []
        for index in range(len(self._outs)):
            places = [place for place in chosen.values() if index in place.rows]
            if places:
                columns = [column[row] for place in places for row in _evened(place.rows[index])]
                shares.append(self._share(index, columns, [pair for place in places for pair in place.pairs[index]]))
        return PackedRows(
            self._blocks(blocks), self._wide, sum(self._outs),
            torch.tensor([[owner.get(row, NOBODY) for row in covered]]), tuple(shares),
        )  # fmt: skip

    def _share(self, index: int, columns: list[int], pairs: list[int]) -> Share:
        b, start = self._b[index], sum(self._outs[:index])
        taken = None if pairs == list(range(b.shape[1])) else torch.tensor(pairs)
        return Share(torch.tensor(columns), b, taken, start, start + self._outs[index])

    def _blocks(self, numbers: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return blocks of A, each flat; those that lie together as one view."""
        ends = [(number * BLOCK * self._wide, (number + 1) * BLOCK * self._wide) for number in numbers]
        joined = numbers[-1] - numbers[0] + 1 == len(numbers)
        return tuple(self._a[start:stop] for start, stop in ([(ends[0][0], ends[-1][1])] if joined else ends))

    def _held(self) -> dict[int, Factors]:
        """Return every adapter's factors, unpacked."""
        a = unpack_outputs(self._a, self._wide)
        b = [unpack_inputs(packed) for packed in self._b]
        return {
            slot: {
                index: (a[rows.start : rows.stop], b[index][2 * place.pairs[index].start :][: len(rows)])
                for index, rows in place.rows.items()
            }
            for slot, place in self._places.items()
        }

    def _pack(self, held: Mapping[int, Factors]) -> None:
        a = [rows for factors in held.values() for rows, _ in factors.values()]
        height = -(-sum(rows.shape[0] for rows in a) // TILE) * TILE
        packed_a = pack_outputs(to_height(a, height, self._wide))
        packed_b = tuple(
            pack_inputs([factors[index][1] for factors in held.values() if index in factors], out)
            for index, out in enumerate(self._outs)
        )
        ranks = {slot: {index: rows.shape[0] for index, (rows, _) in one.items()} for slot, one in held.items()}
        self._a, self._b, self._height, self._places = packed_a, packed_b, height, _places(ranks)


def _places(ranks: Mapping[int, Mapping[int, int]]) -> dict[int, Place]:
    """Return where each adapter lies. ranks: by slot and slice, in the order of A."""
    found: dict[int, Place] = {}
    row, pair = 0, dict.fromkeys({index for own in ranks.values() for index in own}, 0)
    for slot, own in ranks.items():
        rows, pairs = {}, {}
        for index, rank in own.items():
            rows[index] = range(row, row + rank)
            pairs[index] = range(pair[index], pair[index] + -(-rank // 2))
            row, pair[index] = rows[index].stop, pairs[index].stop
        found[slot] = Place(rows, pairs)
    return found


def ready(x: torch.Tensor) -> torch.Tensor:
    """Return x as the kernel takes it."""
    return x if x.dtype == torch.bfloat16 and x.is_contiguous() else x.to(torch.bfloat16).contiguous()


def _chunks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (rows,) if rows.shape[0] <= CHUNK else torch.split(rows, CHUNK)


def _evened(rows: range) -> list[int]:
    """Return the rows, and one again where their number is odd: B has zeros there."""
    return [*rows, *rows[: len(rows) % 2]]


def _to_width(rows: torch.Tensor, wide: int) -> torch.Tensor:
    """Return rows in bfloat16, with zeros up to a width."""
    return torch.nn.functional.pad(rows.to(torch.bfloat16), (0, wide - rows.shape[1]))
