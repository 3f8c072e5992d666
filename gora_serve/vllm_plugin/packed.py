"""A layer's adapters in the layout of vLLM's own CPU kernel for small products of bfloat16 (`weight_packed_linear`).

PyTorch's products of bfloat16 make a kernel for each new shape (a quarter of a millisecond), and those of float32 need
converted weights; this kernel does neither. It takes a weight (n, k) in blocks of 32 outputs, the last of 16 or 32; in
a block, pairs of inputs lie together: (k / 2, 32, 2). So A is filled up with zeros to a number of rows that 16 divides,
and an adapter's B to an even number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

BLOCK, TILE = 32, 16  # outputs of a block, and of the smallest one
CHUNK = 256  # tokens whose sum stays in the processor's cache until it is added
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
        """Return the weight (out, ranks), in the kernel's layout."""
        b = self.b if self.pairs is None else self.b.index_select(1, self.pairs)
        return b.view(self.stop - self.start, -1)


@dataclass(frozen=True)
class PackedRows:
    """The rows of some adapters. a: the blocks of A that have them, each flat. owners: (1, columns), the slot of each
    column of h, or NOBODY. whole: whether the shares are all of y.
    """

    a: tuple[torch.Tensor, ...]
    wide: int
    owners: torch.Tensor
    shares: tuple[Share, ...]
    whole: bool

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (tokens, in) times Aᵀ: (tokens, columns)."""
        a = (self.a[0] if len(self.a) == 1 else torch.cat(self.a)).view(-1, self.wide)
        h = torch.empty(x.shape[0], a.shape[0], dtype=a.dtype)
        _product(h, x.to(a.dtype).contiguous(), a)
        return h

    def grow(self, y: torch.Tensor, h: torch.Tensor, scale: float) -> None:
        """Add scale times h (tokens, columns) times B to y (tokens, out) in place."""
        weights = [share.take() for share in self.shares]
        for some, own in zip(torch.split(y, CHUNK), torch.split(h, CHUNK), strict=True):
            added = torch.empty(some.shape, dtype=h.dtype) if self.whole else torch.zeros(some.shape, dtype=h.dtype)
            for share, weight in zip(self.shares, weights, strict=True):
                _product(added[:, share.start : share.stop], own.index_select(1, share.columns), weight)
            some.add_(added, alpha=scale)


class PackedStore:
    """All adapters of a layer, in the order in which they came, made anew when one comes or goes.

    A: the rows of each adapter, by slice. B: for each slice (out / 32, pairs, 32, 2).
    """

    def __init__(self, wide: int, outs: Sequence[int]) -> None:
        self._wide, self._outs = wide, tuple(outs)
        self._ranks: dict[int, dict[int, int]] = {}  # slot -> slice -> rank
        self._pack({})

    @property
    def held_bytes(self) -> int:
        return self._a.nbytes + sum(b.nbytes for b in self._b)

    def put(self, slot: int, factors: Factors) -> None:
        """Take in an adapter. factors: A (r, <= in) and B (r, <= out) of the slices that it has."""
        held = {number: self._read(number) for number in self._ranks}
        wide = {index: (_to_width(a, self._wide), _to_width(b, self._outs[index])) for index, (a, b) in factors.items()}
        self._ranks[slot] = {index: a.shape[0] for index, (a, _) in wide.items()}
        self._pack(held | {slot: wide})

    def remove(self, slot: int) -> None:
        held = {number: self._read(number) for number in self._ranks if number != slot}
        self._ranks.pop(slot, None)
        self._pack(held)

    def part(self, slot: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of one adapter's A (r, in) and B (r, out) of a slice that it has."""
        return self._read(slot)[index]

    def select(self, slots: Sequence[int]) -> PackedRows | None:
        """Return what has the ranks of these adapters; None for none at all."""
        rows = {slot: self._rows(slot) for slot in slots if self._ranks.get(slot)}  # of A, by slice
        if not rows:
            return None
        blocks = sorted({row // BLOCK for own in rows.values() for part in own.values() for row in part})
        covered = [row for block in blocks for row in range(BLOCK * block, min(BLOCK * (block + 1), self._height))]
        column = {row: number for number, row in enumerate(covered)}
        owner = {row: slot for slot, own in rows.items() for part in own.values() for row in part}
        shares = []
        for index in range(len(self._outs)):
            own = [slot for slot in rows if index in rows[slot]]
            if own:
                columns = [column[row] for slot in own for row in _evened(rows[slot][index])]
                pairs = [pair for slot in own for pair in self._pairs(slot, index)]
                shares.append(self._share(index, columns, pairs))
        owners = torch.tensor([[owner.get(row, NOBODY) for row in covered]])
        return PackedRows(
            self._blocks(blocks), self._wide, owners, tuple(shares), len(shares) == len(self._outs)
        )  # fmt: skip

    def _share(self, index: int, columns: list[int], pairs: list[int]) -> Share:
        b, start = self._b[index], sum(self._outs[:index])
        taken = None if pairs == list(range(b.shape[1])) else torch.tensor(pairs)
        return Share(torch.tensor(columns), b, taken, start, start + self._outs[index])

    def _rows(self, slot: int) -> dict[int, range]:
        """Return which rows of A an adapter has, by slice."""
        start = 0
        for number, ranks in self._ranks.items():
            if number == slot:
                break
            start += sum(ranks.values())
        found = {}
        for index, rank in self._ranks[slot].items():
            found[index] = range(start, start + rank)
            start += rank
        return found

    def _pairs(self, slot: int, index: int) -> range:
        """Return which pairs of a slice's B an adapter has."""
        start = 0
        for number, ranks in self._ranks.items():
            count = -(-ranks.get(index, 0) // 2)
            if number == slot:
                return range(start, start + count)
            start += count
        return range(0)

    def _blocks(self, numbers: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return blocks of A, each flat; those that lie together as one view."""
        ends = [(number * BLOCK * self._wide, (number + 1) * BLOCK * self._wide) for number in numbers]
        joined = numbers[-1] - numbers[0] + 1 == len(numbers)
        return tuple(self._a[start:stop] for start, stop in ([(ends[0][0], ends[-1][1])] if joined else ends))

    def _pack(self, held: Mapping[int, Factors]) -> None:
        a = [part[0] for factors in held.values() for part in factors.values()]
        self._height = -(-sum(rows.shape[0] for rows in a) // TILE) * TILE
        self._a = pack_outputs(_to_height(a, self._height, self._wide))
        self._b = tuple(
            pack_inputs([factors[index][1] for factors in held.values() if index in factors], out)
            for index, out in enumerate(self._outs)
        )

    def _read(self, slot: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        a = unpack_outputs(self._a, self._wide)
        found = {}
        for index, rows in self._rows(slot).items():
            pairs = self._pairs(slot, index)
            b = self._b[index][:, pairs.start : pairs.stop].permute(1, 3, 0, 2).reshape(2 * len(pairs), -1)
            found[index] = a[rows.start : rows.stop], b[: len(rows)]
        return found


def can_pack(wide: int, outs: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a layer of these sizes can be packed, and this processor's vLLM has the kernel."""
    fits = wide % 2 == 0 and all(out % BLOCK == 0 for out in outs)
    return fits and dtype == torch.bfloat16 and torch.device(device).type == "cpu" and has_kernel()


def has_kernel() -> bool:
    """Whether vLLM's kernel is there, this processor multiplies bfloat16, and a small product comes out right."""
    return hasattr(torch.ops._C, "weight_packed_linear") and torch.cpu._is_avx512_bf16_supported() and _multiplies()


@cache
def _multiplies() -> bool:
    numbers = torch.arange(3 * 6 + TILE * 6).to(torch.bfloat16) % 7 - 3  # small whole numbers: exact in bfloat16
    x, weight = numbers[: 3 * 6].view(3, 6), numbers[3 * 6 :].view(TILE, 6)
    found = torch.empty(3, TILE, dtype=torch.bfloat16)
    _product(found, x, pack_outputs(weight).view(TILE, 6))
    return torch.equal(found.float(), x.float() @ weight.float().t())


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
    even = [_to_height([b], b.shape[0] + b.shape[0] % 2, out) for b in ranks]
    joined = _to_height(even, sum(b.shape[0] for b in even), out)
    return joined.view(-1, 2, out // BLOCK, BLOCK).permute(2, 0, 3, 1).contiguous()


def _pack_blocks(weight: torch.Tensor, count: int) -> torch.Tensor:
    return weight.reshape(-1, count, weight.shape[1] // 2, 2).transpose(1, 2).reshape(-1)


def _evened(rows: range) -> list[int]:
    """Return the rows, and one again where their number is odd: B has zeros there."""
    return [*rows, *rows[: len(rows) % 2]]


def _to_width(rows: torch.Tensor, wide: int) -> torch.Tensor:
    """Return rows in bfloat16, with zeros up to a width."""
    return torch.nn.functional.pad(rows.to(torch.bfloat16), (0, wide - rows.shape[1]))


def _to_height(rows: Sequence[torch.Tensor], height: int, wide: int) -> torch.Tensor:
    """Return rows one after the other, with zeros up to a height."""
    missing = height - sum(part.shape[0] for part in rows)
    return torch.cat([*rows, torch.zeros(missing, wide, dtype=torch.bfloat16)])


def _product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Write x (tokens, k), contiguous, times a packed weight (n, k) into out (tokens, n), whose rows may be apart."""
    torch.ops._C.weight_packed_linear(out, x, weight, None, True)
