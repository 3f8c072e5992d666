"""The work of a merge in blocks: each reads some elements of a base's tensor, makes the merged ones, and hashes both.

Blocks are independent of each other and run in threads; they come back in their order. Never more than a few are in
memory. A block is whole leaves of both digests (4 MiB), whatever the two types.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from gora_serve.deploy.base import is_finite
from gora_serve.deploy.merge_values import TORCH, Target
from gora_serve.deploy.sums import Sum
from gora_serve.deploy.tally import Tally
from gora_serve.integrity.digest import CHUNK
from gora_serve.integrity.headers import TensorEntry, read_open_header
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.reading import open_regular, read_into

SMALL = 1 << 17  # elements that are summed at a time: what a core's own cache holds
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: the open file, its first byte there, what its header says."""

    fd: int
    begin: int
    entry: TensorEntry
    path: Path

    @property
    def elements(self) -> int:
        return math.prod(self.entry.shape)

    def read(self, start: int, stop: int) -> bytearray:
        """Return the bytes [start, stop) of the tensor."""
        data = bytearray(stop - start)
        read_into(self.fd, self.begin + start, data, path=self.path)
        return data


@dataclass(frozen=True)
class Made:
    """A block of the merged model: its bytes, the leaves of the base's bytes and of its own, and what rounding did.

    overflowed: a finite number of the base's is none in the type that it was cast to.
    """

    data: bytes | bytearray | memoryview
    read: tuple[bytes, ...]
    leaves: tuple[bytes, ...]
    tally: Tally | None = None
    overflowed: bool = False


def leaf(data: bytes | bytearray | memoryview) -> bytes:
    digest = hashlib.sha256(b"\0")
    digest.update(data)
    return digest.digest()


def leaves_of(data: bytearray | memoryview) -> tuple[bytes, ...]:
    """Return the leaf of each 4 MiB; at least one."""
    view = memoryview(data)
    return tuple(leaf(view[start : start + CHUNK]) for start in range(0, max(len(view), 1), CHUNK))


def spans(elements: int, *sizes: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of the blocks of a tensor whose elements have these sizes in bytes; at least one."""
    step = CHUNK // min(sizes)
    for start in range(0, max(elements, 1), step):
        yield start, min(start + step, elements)


def copied(source: Stored, start: int, stop: int) -> Made:
    """Return a block of bytes as they are."""
    data = source.read(start, stop)
    leaves = leaves_of(data)
    return Made(data, leaves, leaves)


def cast(source: Stored, target: Target, start: int, stop: int) -> Made:
    """Return a block of elements in another type, rounded once."""
    size = TORCH[source.entry.dtype].itemsize
    data = source.read(start * size, stop * size)
    out = bytearray((stop - start) * TORCH[target.dtype].itemsize)
    overflowed = False
    if out:
        before, rounded = as_tensor(data, source.entry.dtype), as_tensor(out, target.dtype)
        rounded.copy_(before)
        overflowed = not is_finite(rounded) and bool((before.isfinite() & ~rounded.isfinite()).any())
    return Made(out, leaves_of(data), leaves_of(out), overflowed=overflowed)


def merged(source: Stored | None, target: Target, total: Sum, start: int, stop: int) -> Made:
    """Return a block of elements of a sum, rounded once; source: the base's tensor, None where the sum has its own."""
    out = bytearray((stop - start) * TORCH[target.dtype].itemsize)
    rounded, tally = as_tensor(out, target.dtype), Tally()
    read: list[bytes] = []
    for row, end, W, inside, place, rows in summed_rows(source, total, start, stop, read):
        value = total.rows(row, end, W)
        if total.both is not None and rows is not None:
            _see_both(total.both, row, end, rows, rounded.dtype, inside, tally)
        exact = value.view(-1)[inside]
        rounded[place].copy_(exact)
        stored = None if rows is None else rows.view(-1)[inside]
        if total.ground is None:
            same = stored if stored is not None and stored.dtype == rounded.dtype else None
            tally.see(W.reshape(-1)[inside], exact, rounded[place], same)
        else:
            kept = None if stored is None else stored.to(rounded.dtype)
            tally.see(W.reshape(-1)[inside], exact, rounded[place], kept=kept)
    return Made(out, tuple(read), leaves_of(out), tally)


def summed_rows(
    source: Stored | None, total: Sum, start: int, stop: int, read: list[bytes] | None = None
) -> Iterator[tuple[int, int, Tensor, slice, slice, Tensor | None]]:
    """Yield the rows that elements [start, stop) lie in, some at a time: first row, last, the base's rows in the type
    of sums, which of their elements are asked for, where these are counted from `start`, and the rows as stored.

    read: gets the leaves of the base's own bytes of these elements.
    """
    columns = max(total.shape[1], 1)
    first, last = start // columns, math.ceil(stop / columns)
    stored = None
    if source is not None:
        size = TORCH[source.entry.dtype].itemsize
        data = source.read(first * columns * size, last * columns * size)
        view = memoryview(data)[(start - first * columns) * size : (stop - first * columns) * size]
        if read is not None:
            read += leaves_of(view)
        stored = as_tensor(data, source.entry.dtype).view(-1, columns) if data else None
    step = max(1, SMALL // columns)
    for row in range(first, last, step):
        end = min(row + step, last)
        rows = None if stored is None else stored[row - first : end - first]
        low, high = max(start, row * columns), min(stop, end * columns)
        inside = slice(low - row * columns, high - row * columns)
        yield row, end, total.base(row, end, rows), inside, slice(low - start, high - start), rows


def opened_tensors(stack: ExitStack, folder: Path) -> dict[str, Stored]:
    """Open a model's files, for as long as `stack` is open, and return where each tensor lies."""
    places = {}
    for path in find_model(folder).weights.values():
        fd = stack.enter_context(open_regular(path))
        header = read_open_header(fd, path)
        for entry in header.entries.values():
            places[entry.name] = Stored(fd, header.data_start + entry.begin, entry, path)
    return places


def _see_both(
    both: tuple[Sum, Sum], row: int, end: int, rows: Tensor, dtype: torch.dtype, inside: slice, tally: Tally
) -> None:
    """Note how far adding to the stored rows, and adding to those in 4 bits, is from the model in training."""
    kept, trained = (one.rows(row, end, one.base(row, end, rows)) for one in both)
    away = [(one.to(dtype).to(trained.dtype) - trained).view(-1)[inside] for one in (kept, trained)]
    tally.add(Tally(squared_stored=float(away[0].dot(away[0])), squared_quantized=float(away[1].dot(away[1]))))


def as_tensor(data: bytearray, dtype: str) -> Tensor:
    """Return the bytes as a vector of a type in safetensors' spelling; no bytes make an empty one."""
    return torch.frombuffer(data, dtype=TORCH[dtype]) if data else torch.empty(0, dtype=TORCH[dtype])


def workers() -> int:
    return min(8, max(2, os.cpu_count() or 2))


def in_order(
    items: Iterable[Item], work: Callable[[Item], Result], *, threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, in order, while threads work on the next few.

    torch computes on one core in each of them meanwhile.
    """
    count = threads or workers()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > count + 1:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
