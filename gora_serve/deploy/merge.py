"""Writing a merged model into a folder: the base's shards, with other bytes where a plan says so. An edge.

Everything is read once: while a block is merged, its bytes count for the base's manifest, and what comes of it for the
merged model's. A thread writes, one hashes whole files, the others compute.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.blocks import Made, Stored, cast, copied, in_order, merged, opened_tensors, spans
from gora_serve.deploy.merge_values import TORCH, ModelPlan, Target
from gora_serve.deploy.sum_of import FourBits, refuse_odd, sum_of
from gora_serve.deploy.sums import Sum
from gora_serve.deploy.tally import Tally
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.digest import TensorRecord, digest_of_leaves
from gora_serve.integrity.files import write_json
from gora_serve.integrity.headers import encode_header, read_header
from gora_serve.integrity.layout import INDEX, confined, find_model
from gora_serve.integrity.space import require_space
from gora_serve.progress import Listener, Progress, silent

PIECE = 1 << 17  # bytes of a write: larger ones were up to seven times as slow, in page cache alone


@dataclass
class Written:
    """What was read and written. base, merged: the tensors' digests. files: name -> size and SHA-256. tallies: of the
    tensors that were merged, by name."""

    base: dict[str, TensorRecord] = field(default_factory=dict)
    merged: dict[str, TensorRecord] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One block. last: of its target. counted: the base's bytes in it count for the base's digest."""

    target: Target
    source: Stored | None
    total: Sum | None
    start: int
    stop: int
    last: bool
    counted: bool
    keeps: bool = True  # it belongs into the merged model; else it is read for the base's digest alone

    def run(self) -> Made:
        if not self.keeps or (self.total is None and self.source and self.source.entry.dtype == self.target.dtype):
            assert self.source is not None
            return copied(self.source, self.start, self.stop)
        if self.total is None:
            assert self.source is not None
            return cast(self.source, self.target, self.start, self.stop)
        return merged(self.source, self.target, self.total, self.start, self.stop)


def write_model(
    stage: Path, base: BaseWeights, plan: ModelPlan, *, four_bits: FourBits | None = None, listen: Listener = silent
) -> Written:
    """Write the merged weights, and their index where the base has one, into `stage`. Raises InputError: GS-3401 for
    numbers that the type cannot hold, sums or the base's own, GS-3142 and GS-3105 for numbers that are none;
    MismatchError (GS-101); MachineError (GS-560) where the disk has no room."""
    model = find_model(base.folder)
    shards = _shards(base, plan, {path: name for name, path in model.weights.items()})
    done, total = Written(), sum(target.nbytes for target in plan.targets)
    require_space(stage, total)
    with ExitStack() as stack:
        places = opened_tensors(stack, base.folder)
        writer = stack.enter_context(ShardWriter(stage))
        jobs = (
            job for targets in shards.values() for target in targets for job in _jobs(base, target, places, four_bits)
        )
        collected = _Collected(base, done)
        current, written = None, 0
        shard_of = {target.name: name for name, targets in shards.items() for target in targets}
        for job, made in in_order(jobs, Job.run):
            if shard_of[job.target.name] != current:
                current = shard_of[job.target.name]
                layout = [(one.name, one.dtype, one.shape) for one in shards[current]]
                writer.begin(
                    current, encode_header(layout, {"format": "pt", **read_header(model.weights[current]).metadata})
                )
            collected.take(job, made)
            if job.keeps:
                writer.write(made.data)
                written += len(made.data)
                listen(Progress("merge", written, total, in_bytes=True))
        done.files |= writer.finish()
    if model.placed is not None:
        _write_index(stage, base.folder, plan, shard_of)
    return done


def _shards(base: BaseWeights, plan: ModelPlan, names: Mapping[Path, str]) -> dict[str, list[Target]]:
    """Return the targets of each file, in the order of the base's bytes; what is fresh comes last in the last file."""
    shards: dict[str, list[Target]] = {name: [] for name in sorted(names.values())}
    for target in plan.targets:
        if not target.fresh:
            shards[names[base.tensors.files[target.name]]].append(target)
    shards[max(shards)] += [target for target in plan.targets if target.fresh]
    return shards


def _jobs(base: BaseWeights, target: Target, places: Mapping[str, Stored], four_bits: FourBits | None) -> Iterator[Job]:
    """Yield the blocks of a target; the sum is made when its turn comes, and gone after the last block."""
    source = places[target.source] if target.source is not None else None
    total = sum_of(base, target, four_bits)
    counted = source is not None and not target.fresh
    if source is not None and source.entry.shape != target.shape:  # a resized vocabulary: nothing of it is kept
        size = source.entry.nbytes // max(source.elements, 1)
        if counted:
            for start, stop in spans(source.elements, size):
                yield Job(target, source, None, start * size, stop * size, stop == source.elements, True, keeps=False)
        source, counted = None, False
    if source is not None and total is None and source.entry.dtype == target.dtype:
        for start, stop in spans(source.entry.nbytes, 1):
            yield Job(target, source, None, start, stop, stop == source.entry.nbytes, counted)
        return
    elements = source.elements if source is not None else target.elements
    sizes = [TORCH[target.dtype].itemsize] + ([TORCH[source.entry.dtype].itemsize] if source else [])
    for start, stop in spans(elements, *sizes):
        yield Job(target, source, total, start, stop, stop == elements, counted)


class _Collected:
    """Leaves and tallies of the tensor that is being written, until its last block."""

    def __init__(self, base: BaseWeights, done: Written) -> None:
        self.base, self.done = base, done
        self.read: list[bytes] = []
        self.leaves: list[bytes] = []
        self.tally: Tally | None = None

    def take(self, job: Job, made: Made) -> None:
        target = job.target
        self.read += made.read if job.counted else ()
        self.leaves += made.leaves if job.keeps else ()
        if made.tally is not None:
            self.tally = self.tally or Tally()
            self.tally.add(made.tally)
        if made.overflowed or (made.tally is not None and not made.tally.is_finite):
            raise refuse_odd(self.base, target)
        if not job.last:
            return
        if job.counted:
            entry = self.base.tensors.entries[str(target.source)]
            digest = digest_of_leaves(entry.nbytes, self.read)
            self.done.base[entry.name] = TensorRecord(entry.dtype, entry.shape, entry.nbytes, digest)
        if job.keeps:
            digest = digest_of_leaves(target.nbytes, self.leaves)
            self.done.merged[target.name] = TensorRecord(target.dtype, target.shape, target.nbytes, digest)
            if self.tally is not None:
                self.done.tallies[target.name] = self.tally
            self.leaves, self.tally = [], None
        self.read = []


class ShardWriter:
    """Files of a stage, one after the other: written here, hashed and made durable in threads beside."""

    def __init__(self, stage: Path) -> None:
        self.stage = stage
        self.name, self.fd, self.size = "", -1, 0
        self.digest = hashlib.sha256()
        self.hashing: list[Future[None]] = []
        self.syncing: list[Future[None]] = []
        self.digests: dict[str, tuple[int, Any]] = {}
        self.hasher, self.syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.hasher, self.syncer):
            pool.shutdown(wait=True, cancel_futures=True)
        if self.fd >= 0:
            os.close(self.fd)

    def begin(self, name: str, header: bytes) -> None:
        """Start a file, the one before it being whole."""
        self._end()
        path = self.stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self.name, self.size, self.digest = name, 0, hashlib.sha256()
        self.write(header)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the file. `data` must not change any more."""
        self.hashing.append(self.hasher.submit(self.digest.update, data))
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view[:PIECE]) :]
            except OSError as err:
                err.filename = str(self.stage / self.name)
                raise
        self.size += len(data)
        while len(self.hashing) > 2:  # so that no more than two blocks wait
            self.hashing.pop(0).result()

    def finish(self) -> dict[str, tuple[int, str]]:
        """Wait until all is on disk; return size and SHA-256 of each file."""
        self._end()
        for waiting in self.syncing:
            waiting.result()
        return {name: (size, digest.hexdigest()) for name, (size, digest) in self.digests.items()}

    def _end(self) -> None:
        if self.fd < 0:
            return
        for waiting in self.hashing:
            waiting.result()
        self.hashing = []
        self.digests[self.name] = (self.size, self.digest)
        fd, self.fd = self.fd, -1
        self.syncing.append(self.syncer.submit(partial(_sync, fd, self.stage / self.name)))


def _sync(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as err:
        err.filename = str(path)
        raise
    finally:
        os.close(fd)


def _write_index(stage: Path, folder: Path, plan: ModelPlan, shard_of: Mapping[str, str]) -> None:
    """Write the index with the bytes, and where the base's names them the parameters, of the merged model."""
    index = read_json(confined(folder, INDEX), limit=1 << 26)
    assert isinstance(index, dict)
    said = index.get("metadata")
    metadata = dict(said) if isinstance(said, dict) else {}
    sizes = {target.name: target.nbytes for target in plan.targets}
    metadata["total_size"] = sum(sizes.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(target.elements for target in plan.targets)
    placed = {target.name: shard_of[target.name] for target in plan.targets}
    write_json(stage / INDEX, {**index, "metadata": metadata, "weight_map": dict(sorted(placed.items()))})
