"""From a folder or a file to what it hashes to: every tensor's digest, three roots, and the files they came from.

`hash_model` proves which weights a folder holds; `make_manifest` also hashes its files whole, to be stored. What a
manifest is, as a value and as JSON, is in `manifest_schema`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from gora_serve.errors import InputError, MismatchError
from gora_serve.integrity.cache import Digests, QuickCache, now
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.digest import Differences, TensorRecord, differences, tensor_digest, weights_root
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.hashing import OpenFile, hash_tensors
from gora_serve.integrity.headers import AGAIN, Header, read_header, read_open_header
from gora_serve.integrity.layout import INDEX, blob_name, confined, find_model
from gora_serve.integrity.manifest_schema import FileRecord, Manifest, Roots, tensors_from_json, tensors_to_json
from gora_serve.integrity.reading import open_regular
from gora_serve.integrity.roots import config_root, tokenizer_names, tokenizer_root
from gora_serve.progress import Listener, silent

__all__ = [
    "Differences", "FileRecord", "Manifest", "Roots", "TensorRecord", "check_index", "config_root", "differences",
    "hash_adapter", "hash_model", "make_manifest", "tensor_digest", "tensors_from_json", "tensors_to_json",
    "tokenizer_root", "weights_root",
]  # fmt: skip


def hash_model(directory: Path, *, listen: Listener = silent, cache: QuickCache | None = None) -> Manifest:
    """Return the roots and tensors of the model folder `directory` from all bytes of its weights; no `files`.

    Every byte of a weight file is a tensor's or its header's, and the header is read for all that it says but its
    metadata. A blob of the hub's cache is hashed whole too, as its name is its SHA-256.

    With `cache`, files that it knows are not read again, and the others are remembered. `listen` gets stage "hash"
    with the bytes hashed so far, on the calling thread. Raises what `find_model` and `read_header` raise, InputError
    GS-326 to GS-328 where index and shards disagree, MismatchError GS-101 where a file changed meanwhile and GS-105
    where a hub cache blob is not what its name says.
    """
    begun = now()
    with _open_model(directory) as model:
        found = _digest_files(model, model.promised, listen, cache)
    _keep(model, found, cache, begun)
    return _manifest(model, found)


def make_manifest(directory: Path, *, listen: Listener = silent, cache: QuickCache | None = None) -> Manifest:
    """Return the manifest of the model folder `directory` with the SHA-256 of its files: what `hash` stores.

    Hashes the bytes of the weights twice, by tensor and whole. Raises as `hash_model` does.
    """
    begun = now()
    with _open_model(directory) as model:
        found = _digest_files(model, model.files, listen, cache)
    _keep(model, found, cache, begun)
    sizes = {name: file.header.file_size for name, file in model.files.items()}
    weights = [FileRecord(name, sizes[name], str(digests.sha256)) for name, digests in found.digests.items()]
    names = [name for name in (INDEX, "config.json") if (directory / name).is_file()] + tokenizer_names(directory)
    small = [FileRecord(name, *sha256_file(confined(directory, name))) for name in names]
    return replace(_manifest(model, found), files=(*weights, *small))


def check_index(directory: Path) -> None:
    """Hold the index of the model in `directory`, if it has one, against the headers of its files; no weights are read.

    Raises InputError GS-326 to GS-328 where they disagree, and what `find_model` and `read_header` raise.
    """
    model = find_model(directory)
    _check_placement(directory, {name: read_header(path) for name, path in model.weights.items()}, model.placed)


@dataclass(frozen=True)
class _Model:
    """A model's weight files, opened. `promised`: file -> the SHA-256 that its blob in the hub's cache is called by."""

    directory: Path
    files: Mapping[str, OpenFile]
    statuses: Mapping[str, os.stat_result]
    promised: Mapping[str, str]


@contextmanager
def _open_model(directory: Path) -> Iterator[_Model]:
    model = find_model(directory)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open_weights(path)) for name, path in model.weights.items()}
        _check_placement(directory, {name: file.header for name, file in files.items()}, model.placed)
        statuses = {name: os.fstat(file.fd) for name, file in files.items()}
        blobs = {name: blob_name(directory, name) for name in files}
        yield _Model(directory, files, statuses, {name: blob for name, blob in blobs.items() if _is_sha256(blob)})


@contextmanager
def _open_weights(path: Path) -> Iterator[OpenFile]:
    with open_regular(path) as fd:
        yield OpenFile(fd, path, read_open_header(fd, path))


def _is_sha256(blob: str | None) -> TypeGuard[str]:
    return blob is not None and len(blob) == 64


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


@dataclass(frozen=True)
class _Found:
    """What the weight files hash to; the leaves of the larger tensors that were read; the files that were read."""

    digests: Mapping[str, Digests]
    leaves: Mapping[str, tuple[str, ...]]
    fresh: Collection[str]


def _digest_files(model: _Model, whole: Collection[str], listen: Listener, cache: QuickCache | None) -> _Found:
    """Hash every tensor, and the files in `whole` as they are, but what the cache knows."""
    known = {
        name: _known(cache, model.statuses[name], file.header, needs_whole=name in whole)
        for name, file in model.files.items()
    }
    fresh = {name: file for name, file in model.files.items() if known[name] is None}
    tensors, files = hash_tensors(fresh, [name for name in fresh if name in whole], listen=listen)
    digests = {
        name: known[name] or Digests(files.get(name), {entry: one.digest for entry, one in tensors[name].items()})
        for name in model.files
    }
    for name, promised in model.promised.items():
        _check_blob(promised, model.files[name].path, digests[name].sha256)
    leaves = {entry: one.leaves for found in tensors.values() for entry, one in found.items() if one.leaves}
    return _Found(digests, leaves, fresh.keys())


def _known(
    cache: QuickCache | None, status: os.stat_result, header: Header, *, needs_whole: bool = False
) -> Digests | None:
    """Return what the cache knows of a weight file if it is all that is needed, and count that as reused."""
    found = cache.find(status) if cache else Digests()
    if cache is None or (found.tensors or {}).keys() != header.entries.keys() or (needs_whole and not found.sha256):
        return None
    cache.reused += 1
    return Digests(found.sha256, found.tensors or {})


def _keep(model: _Model, found: _Found, cache: QuickCache | None, begun: int) -> None:
    if cache is None:
        return
    for name in found.fresh:
        cache.keep(model.statuses[name], found.digests[name], begun=begun)


def _check_blob(promised: str, path: Path, sha256: str | None) -> None:
    if promised != sha256:
        raise MismatchError(
            "a file of the hub cache is not what its name says", code="GS-105", file=path,
            expected=promised, actual=sha256, hint="delete this file and download the model again",
        )  # fmt: skip


def _manifest(model: _Model, found: _Found) -> Manifest:
    tensors = {
        name: record
        for file, digests in found.digests.items()
        for name, record in _records(model.files[file].header, digests).items()
    }
    roots = Roots(weights_root(tensors), config_root(model.directory), tokenizer_root(model.directory))
    return Manifest(roots, tensors, _tied(model.directory, tensors), leaves=found.leaves)


def _records(header: Header, digests: Digests) -> dict[str, TensorRecord]:
    known = digests.tensors or {}
    return {
        entry.name: TensorRecord(entry.dtype, entry.shape, entry.nbytes, known[entry.name])
        for entry in header.entries.values()
    }


def _tied(directory: Path, tensors: Mapping[str, TensorRecord]) -> dict[str, str]:
    """Return {"lm_head.weight": embedding} where config.json ties them and only the embedding is stored."""
    path = directory / "config.json"
    config = read_json(confined(directory, path.name)) if path.exists() else None
    embeddings = [name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if not isinstance(config, dict) or config.get("tie_word_embeddings") is not True or len(embeddings) != 1:
        return {}
    return {} if "lm_head.weight" in tensors else {"lm_head.weight": embeddings[0]}


def hash_adapter(path: Path, *, cache: QuickCache | None = None) -> tuple[str, dict[str, TensorRecord]]:
    """Return the root and the tensors of the safetensors file at `path`, by the same scheme as a model's weights."""
    begun = now()
    with _open_weights(path) as file:
        status = os.fstat(file.fd)
        known = _known(cache, status, file.header)
        if known is None:
            hashed = hash_tensors({path.name: file}, listen=silent)[0][path.name]
            found = Digests(tensors={name: one.digest for name, one in hashed.items()})
    if cache and known is None:
        cache.keep(status, found, begun=begun)
    tensors = _records(file.header, known or found)
    return weights_root(tensors), tensors
