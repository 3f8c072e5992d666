"""The manifest of a model: every tensor's digest, three roots, and the files they came from.

`hash_model` makes one from a folder, `Manifest.from_json` reads a stored one and checks it against its own root.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from gora_serve.errors import InputError, MismatchError
from gora_serve.integrity.cache import Digests, QuickCache, now
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.digest import (
    CHUNK,
    WEIGHTS_DOMAIN,
    Differences,
    TensorRecord,
    differences,
    digest_of_leaves,
    tensor_digest,
    tensor_leaves,
    weights_root,
)
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.headers import AGAIN, Header, read_open_header, tensor_nbytes
from gora_serve.integrity.layout import INDEX, ModelFiles, blob_name, confined, find_model
from gora_serve.integrity.reading import open_regular, pieces, size_of
from gora_serve.integrity.roots import config_root, tokenizer_names, tokenizer_root
from gora_serve.progress import Listener, Progress, silent

__all__ = [
    "Differences", "FileRecord", "Manifest", "Roots", "TensorRecord", "config_root", "differences", "hash_adapter",
    "hash_model", "tensor_digest", "tokenizer_root", "weights_root",
]  # fmt: skip

SCHEMA = WEIGHTS_DOMAIN
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ROOT = re.compile(r"g[bct]1:sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Roots:
    """The three hashes that stand for a base: weights always; config and tokenizer where the folder has them."""

    weights: str
    config: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder: relative POSIX path, size in bytes, hexadecimal SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a model folder held. `aliases` (tied name -> stored name), `files` and `source` stay outside the roots.

    `leaves` has the leaf of each 4 MiB chunk of the larger tensors, where they were computed: they locate damage.
    """

    roots: Roots
    tensors: Mapping[str, TensorRecord]
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def resolved(self) -> dict[str, TensorRecord]:
        """Return the tensors with aliases added under their own names, to compare a tied model with an untied copy."""
        return {**self.tensors, **{name: self.tensors[stored] for name, stored in self.aliases.items()}}

    def to_json(self) -> dict[str, object]:
        """Return the manifest as `gora-serve/base-manifest/1`."""
        return {
            "schema": SCHEMA,
            "weights_root": self.roots.weights,
            "config_root": self.roots.config,
            "tokenizer_root": self.roots.tokenizer,
            "chunk_bytes": CHUNK,
            "totals": {
                "tensors": len(self.tensors),
                "bytes": sum(tensor.nbytes for tensor in self.tensors.values()),
                "params": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
            },
            "source": dict(self.source),
            "tensors": tensors_to_json(self.tensors),
            "leaves": {name: list(leaves) for name, leaves in sorted(self.leaves.items())},
            "aliases": dict(self.aliases),
            "files": [{"path": item.path, "size": item.size, "sha256": item.sha256} for item in self.files],
        }

    @classmethod
    def from_json(cls, value: object, *, file: Path | None = None) -> Manifest:
        """Return the manifest in `value`; keys that it does not know are ignored, `file` is for messages.

        Raises InputError: GS-329 malformed or a key missing, GS-330 another schema, GS-331 its tensors do not give its
        own weights root.
        """
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            hint = "update gora-serve" if str(schema).startswith(SCHEMA[:-1]) else None
            what = "this manifest has a schema that this version does not read"
            raise InputError(what, code="GS-330", file=file, expected=SCHEMA, actual=schema, hint=hint)
        assert isinstance(value, dict)
        try:
            manifest = _read_manifest(value)
        except (KeyError, TypeError, ValueError) as err:
            raise InputError(
                f"this manifest is malformed: {err!r}",
                code="GS-329",
                hint="write it again: gora-serve hash BASE --output FILE",
                file=file,
            ) from err
        if weights_root(manifest.tensors) != manifest.roots.weights:
            what = "the tensors of this manifest do not give its own weights root"
            raise InputError(what, code="GS-331", file=file, hint="write it again with: gora-serve hash BASE")
        return manifest


def _read_manifest(value: Mapping[str, object]) -> Manifest:
    tensors = tensors_from_json(value["tensors"])
    aliases, source = _texts(value["aliases"]), _texts(value["source"])
    if value["chunk_bytes"] != CHUNK or not all(name in tensors for name in aliases.values()):
        raise ValueError("chunk_bytes or aliases")
    weights = _root_text(value["weights_root"])
    if weights is None:
        raise ValueError("weights_root")
    roots = Roots(weights, _root_text(value["config_root"]), _root_text(value["tokenizer_root"]))
    files = value["files"]
    if not isinstance(files, list):
        raise TypeError("files")
    records = tuple(FileRecord(str(item["path"]), _natural(item["size"]), _hex(item["sha256"])) for item in files)
    return Manifest(roots, tensors, aliases, records, source, _read_leaves(value.get("leaves", {}), tensors))


def _read_leaves(value: object, tensors: Mapping[str, TensorRecord]) -> dict[str, tuple[str, ...]]:
    """Return the leaves; ValueError unless they give the digest of their tensor."""
    if not isinstance(value, dict) or not all(isinstance(leaves, list) for leaves in value.values()):
        raise TypeError("leaves")
    result = {name: tuple(_hex(leaf) for leaf in leaves) for name, leaves in value.items()}
    for name, leaves in result.items():
        if digest_of_leaves(tensors[name].nbytes, map(bytes.fromhex, leaves)) != tensors[name].digest:
            raise ValueError(f"leaves of {name}")
    return result


def tensors_to_json(tensors: Mapping[str, TensorRecord]) -> dict[str, object]:
    """Return {name: {dtype, shape, nbytes, digest}}, sorted by name."""
    return {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "nbytes": tensor.nbytes, "digest": tensor.digest}
        for name, tensor in sorted(tensors.items())
    }


def tensors_from_json(value: object) -> dict[str, TensorRecord]:
    """Return the tensors that `tensors_to_json` wrote; KeyError, TypeError or ValueError (InputError) if malformed."""
    if not isinstance(value, dict):
        raise TypeError("tensors")
    result = {}
    for name, item in value.items():
        shape, dtype = tuple(_natural(size) for size in item["shape"]), item["dtype"]
        if tensor_nbytes(name, dtype, shape) != item["nbytes"]:
            raise ValueError(f"nbytes of {name}")
        result[name] = TensorRecord(dtype, shape, item["nbytes"], _hex(item["digest"]))
    return result


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise TypeError("a mapping of strings is something else")
    return value


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a natural number")
    return value


def _hex(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise TypeError(f"{value!r} is not a SHA-256")
    return value


def _root_text(value: object) -> str | None:
    if value is not None and not (isinstance(value, str) and _ROOT.fullmatch(value)):
        raise TypeError(f"{value!r} is not a root")
    return value


def hash_model(directory: Path, *, listen: Listener = silent, cache: QuickCache | None = None) -> Manifest:
    """Return the manifest of the model folder `directory` from all bytes of its weights.

    With `cache`, files that it knows are not read again, and the others are remembered. `listen` gets stage "hash"
    with the bytes hashed so far, on the calling thread. Raises what `find_model` and `read_header` raise, InputError
    GS-326 to GS-328 where index and shards disagree, MismatchError GS-101 where a file changed meanwhile and GS-105
    where a hub cache blob is not what its name says.
    """
    model, begun = find_model(directory), now()
    with ExitStack() as stack:
        opened = {name: stack.enter_context(open_regular(path)) for name, path in model.weights.items()}
        headers = {name: read_open_header(fd, model.weights[name]) for name, fd in opened.items()}
        _check_placement(directory, headers, model.placed)
        statuses = {name: os.fstat(fd) for name, fd in opened.items()}
        known = {name: _known(cache, statuses[name], headers[name]) for name in opened}
        digests, leaves = _hash_files(directory, model, opened, headers, known, listen)
    for name, found in digests.items():
        if cache and known[name] is None:
            cache.keep(statuses[name], found, begun=begun)
    weight_files = [FileRecord(name, headers[name].file_size, str(found.sha256)) for name, found in digests.items()]
    tensors = {
        entry.name: TensorRecord(entry.dtype, entry.shape, entry.nbytes, (digests[name].tensors or {})[entry.name])
        for name, header in headers.items()
        for entry in header.entries.values()
    }
    names = [name for name in (INDEX, "config.json") if (directory / name).is_file()]
    small = [FileRecord(name, *sha256_file(confined(directory, name))) for name in names + tokenizer_names(directory)]
    roots = Roots(weights_root(tensors), config_root(directory), tokenizer_root(directory))
    return Manifest(roots, tensors, _tied(directory, tensors), (*weight_files, *small), leaves=leaves)


def _check_placement(directory: Path, headers: Mapping[str, Header], placed: Mapping[str, str] | None) -> None:
    held: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in held:
                what = f"a tensor is in two files, {held[name]} and {file}"
                raise InputError(
                    what,
                    code="GS-328",
                    hint="download the model again, into an empty folder",
                    file=directory,
                    tensor=name,
                )
            held[name] = file
    if placed is None:
        return
    for name, file in placed.items():
        if held.get(name) != file:
            what = "the index names a tensor that its file does not hold"
            raise InputError(what, code="GS-326", file=directory / file, tensor=name, hint=AGAIN)
    for name in held.keys() - placed.keys():
        what = "a weight file holds a tensor that the index does not name"
        raise InputError(what, code="GS-327", file=directory / held[name], tensor=name, hint=AGAIN)


def _known(cache: QuickCache | None, status: os.stat_result, header: Header) -> Digests | None:
    """Return what the cache knows of a weight file if it is all of it, and count that as reused."""
    found = cache.find(status) if cache else Digests()
    if cache is None or found.sha256 is None or (found.tensors or {}).keys() != header.entries.keys():
        return None
    cache.reused += 1
    return Digests(found.sha256, found.tensors or {})


@dataclass(frozen=True)
class Hashed:
    """A digest, and of a tensor of more than one chunk its leaves."""

    digest: str
    leaves: tuple[str, ...] = ()


Job = tuple[int, Callable[[], Hashed]]  # bytes to hash, the work


def _hash_files(
    directory: Path,
    model: ModelFiles,
    opened: Mapping[str, int],
    headers: Mapping[str, Header],
    known: Mapping[str, Digests | None],
    listen: Listener,
) -> tuple[dict[str, Digests], dict[str, tuple[str, ...]]]:
    """Return the digests of each file and of its tensors, and the leaves of the larger tensors that were read."""
    # Each file is hashed twice, whole and by tensor, at the same time, so that the second reader finds it cached.
    jobs: list[Job] = []
    for name, path in model.weights.items():
        if known[name] is None:
            jobs.append(_file_job(opened[name], path))
            jobs += _tensor_jobs(opened[name], path, headers[name])
    hashed = iter(_run(jobs, listen))
    found: dict[str, Digests] = {}
    leaves: dict[str, tuple[str, ...]] = {}
    for name, path in model.weights.items():
        digests = known[name]
        if digests is None:
            whole = next(hashed).digest
            tensors = {entry: next(hashed) for entry in headers[name].entries}
            digests = Digests(whole, {entry: one.digest for entry, one in tensors.items()})
            leaves |= {entry: one.leaves for entry, one in tensors.items() if one.leaves}
        found[name] = digests
        _check_blob(blob_name(directory, name), path, str(digests.sha256))
    return found, leaves


def _file_job(fd: int, path: Path) -> Job:
    def work() -> Hashed:
        digest = hashlib.sha256()
        for piece in pieces(fd, 0, size_of(fd), path=path):
            digest.update(piece)
        return Hashed(digest.hexdigest())

    return size_of(fd), work


def _tensor_jobs(fd: int, path: Path, header: Header) -> list[Job]:
    def job(begin: int, end: int) -> Job:
        return end - begin, lambda: _hash_tensor(pieces(fd, begin, end, path=path))

    start = header.data_start
    return [job(start + entry.begin, start + entry.end) for entry in header.entries.values()]


def _hash_tensor(buffers: Iterator[memoryview]) -> Hashed:
    nbytes, leaves = tensor_leaves(buffers)
    return Hashed(digest_of_leaves(nbytes, leaves), tuple(leaf.hex() for leaf in leaves) if len(leaves) > 1 else ())


def _run(jobs: Sequence[Job], listen: Listener) -> list[Hashed]:
    """Return the results of `jobs` in their order; hashlib leaves the interpreter lock, so threads run in parallel."""
    total, done = sum(size for size, _ in jobs), 0
    with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2))) as pool:
        futures = {pool.submit(work): size for size, work in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future]
                listen(Progress("hash", done, total))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _check_blob(promised: str | None, path: Path, sha256: str) -> None:
    if promised is not None and len(promised) == len(sha256) and promised != sha256:
        raise MismatchError(
            "a file of the hub cache is not what its name says", code="GS-105", file=path,
            expected=promised, actual=sha256, hint="delete this file and download the model again",
        )  # fmt: skip


def _tied(directory: Path, tensors: Mapping[str, TensorRecord]) -> dict[str, str]:
    """Return {"lm_head.weight": embedding} where config.json ties them and only the embedding is stored."""
    path = directory / "config.json"
    config = read_json(confined(directory, path.name)) if path.exists() else None
    embeddings = [name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if not isinstance(config, dict) or config.get("tie_word_embeddings") is not True or len(embeddings) != 1:
        return {}
    return {} if "lm_head.weight" in tensors else {"lm_head.weight": embeddings[0]}


def hash_adapter(
    path: Path, *, listen: Listener = silent, cache: QuickCache | None = None
) -> tuple[str, dict[str, TensorRecord]]:
    """Return the root and the tensors of the safetensors file at `path`, by the same scheme as a model's weights."""
    begun = now()
    with open_regular(path) as fd:
        header, status = read_open_header(fd, path), os.fstat(fd)
        known = cache.find(status).tensors if cache else None
        fresh = known is None or known.keys() != header.entries.keys()
        if fresh:
            hashed = _run(_tensor_jobs(fd, path, header), listen)
            known = {name: one.digest for name, one in zip(header.entries, hashed, strict=True)}
    assert known is not None
    if cache and fresh:
        cache.keep(status, Digests(tensors=known), begun=begun)
    elif cache:
        cache.reused += 1
    tensors = {
        entry.name: TensorRecord(entry.dtype, entry.shape, entry.nbytes, known[entry.name])
        for entry in header.entries.values()
    }
    return weights_root(tensors), tensors
