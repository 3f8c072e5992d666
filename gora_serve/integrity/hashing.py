"""Hashing the tensors of files, and files whole, on all cores. Nothing here knows what a model is.

Work is cut at chunks, which are leaves of their tensor's digest: a tensor of any size is shared out evenly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from gora_serve.integrity.digest import CHUNK, digest_of_leaves, tensor_leaves
from gora_serve.integrity.headers import Header
from gora_serve.integrity.reading import pieces, size_of
from gora_serve.progress import Listener, Progress

SPAN = 2 * CHUNK  # bytes: about what one thread takes at a time
MOST_THREADS = 8


@dataclass(frozen=True)
class Hashed:
    """The digest of a tensor, and the leaves of one of more than one chunk, all hexadecimal."""

    digest: str
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenFile:
    """A safetensors file that is open at `fd`, with its header; `path` is for messages."""

    fd: int
    path: Path
    header: Header


@dataclass(frozen=True)
class _Span:
    """Bytes [begin, end) of a file, of one tensor, from the start of a chunk."""

    file: str
    tensor: str
    begin: int
    end: int


def hash_tensors(
    files: Mapping[str, OpenFile], whole: Iterable[str] = (), *, listen: Listener
) -> tuple[dict[str, dict[str, Hashed]], dict[str, str]]:
    """Return what each tensor of `files` hashes to, by file and name, and the SHA-256 of the files in `whole`.

    `listen` gets stage "hash" with the bytes hashed so far, on the calling thread.
    """
    batches = _batches(span for name, file in files.items() for span in _spans(name, file.header))
    whole = list(whole)
    jobs: list[_Job] = [(size_of(files[name].fd), _whole_file(files[name])) for name in whole]
    jobs += [(sum(span.end - span.begin for span in batch), _leaves_of(batch, files)) for batch in batches]
    done = _run(jobs, listen)
    leaves: dict[tuple[str, str], list[bytes]] = {}
    for batch, found in zip(batches, done[len(whole) :], strict=True):
        for span, part in zip(batch, found, strict=True):
            leaves.setdefault((span.file, span.tensor), []).extend(part)
    tensors = {
        name: {entry.name: _hashed(entry.nbytes, leaves[name, entry.name]) for entry in file.header.entries.values()}
        for name, file in files.items()
    }
    return tensors, {name: found[0].hex() for name, (found, *_) in zip(whole, done, strict=False)}


def _hashed(nbytes: int, leaves: Sequence[bytes]) -> Hashed:
    shown = tuple(leaf.hex() for leaf in leaves) if len(leaves) > 1 else ()
    return Hashed(digest_of_leaves(nbytes, leaves), shown)


def _spans(file: str, header: Header) -> Iterable[_Span]:
    for entry in header.entries.values():
        start, end = header.data_start + entry.begin, header.data_start + entry.end
        for begin in range(start, max(end, start + 1), SPAN):  # one of an empty tensor too: it has a leaf
            yield _Span(file, entry.name, begin, min(begin + SPAN, end))


def _batches(spans: Iterable[_Span]) -> list[list[_Span]]:
    """Return the spans in their order, small ones together, so that a batch is about SPAN bytes."""
    batches: list[list[_Span]] = []
    room = -1
    for span in spans:
        size = span.end - span.begin
        if size > room:
            batches.append([])
            room = SPAN
        batches[-1].append(span)
        room -= size
    return batches


_Leaves = list[list[bytes]]  # of each span of a batch
_Job = tuple[int, Callable[[], _Leaves]]  # bytes to hash, the work


def _whole_file(file: OpenFile) -> Callable[[], _Leaves]:
    def work() -> _Leaves:
        digest = hashlib.sha256()
        for piece in pieces(file.fd, 0, size_of(file.fd), path=file.path):
            digest.update(piece)
        return [[digest.digest()]]

    return work


def _leaves_of(batch: Sequence[_Span], files: Mapping[str, OpenFile]) -> Callable[[], _Leaves]:
    def work() -> _Leaves:
        found = []
        for span in batch:
            file = files[span.file]
            found.append(tensor_leaves(pieces(file.fd, span.begin, span.end, path=file.path))[1])
        return found

    return work


def _run(jobs: Sequence[_Job], listen: Listener) -> list[_Leaves]:
    """Return the results of `jobs` in their order. hashlib and reads leave the interpreter lock: threads run at once.

    The largest begin first, so that none is left alone at the end.
    """
    total, done = sum(size for size, _ in jobs), 0
    order = sorted(range(len(jobs)), key=lambda index: -jobs[index][0])
    with ThreadPoolExecutor(min(MOST_THREADS, max(2, os.cpu_count() or 2))) as pool:
        futures = {pool.submit(jobs[index][1]): index for index in order}
        try:
            for future in as_completed(futures):
                future.result()
                done += jobs[futures[future]][0]
                listen(Progress("hash", done, total, in_bytes=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = {futures[future]: future.result() for future in futures}
    return [results[index] for index in range(len(jobs))]
