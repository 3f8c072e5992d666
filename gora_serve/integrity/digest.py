"""The hash of one tensor and the one root over many: what "the same weights" means.

Independent of shards, order, file names and header metadata; dependent on each tensor's name, type, shape and bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gora_serve.integrity.canonical import canonical_json

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK = 4 << 20  # bytes per leaf
WEIGHTS_DOMAIN = "gora-serve/base-manifest/1"


@dataclass(frozen=True)
class TensorRecord:
    """What a manifest knows of one tensor; `digest` is the hexadecimal `tensor_digest` of its `nbytes` bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str


def tensor_digest(buffers: Iterable[ReadableBuffer]) -> str:
    """Return the digest of the bytes of `buffers`, joined, as 64 hexadecimal digits; their sizes do not matter.

    leaf_i = SHA256(0x00 | chunk_i) over chunks of 4 MiB, at least one leaf even for no bytes;
    digest = SHA256(0x01 | u64le(nbytes) | leaf_0 | leaf_1 | ...).
    """
    return digest_of_leaves(*tensor_leaves(buffers))


def digest_of_leaves(nbytes: int, leaves: Iterable[bytes]) -> str:
    """Return the digest of a tensor of so many bytes whose chunks have these leaves."""
    return hashlib.sha256(b"\1" + nbytes.to_bytes(8, "little") + b"".join(leaves)).hexdigest()


def tensor_leaves(buffers: Iterable[ReadableBuffer]) -> tuple[int, list[bytes]]:
    """Return the number of bytes in `buffers` and the leaf of each chunk of them."""
    leaves: list[bytes] = []
    leaf, room, total = hashlib.sha256(b"\0"), CHUNK, 0
    for buffer in buffers:
        view = memoryview(buffer)
        rest = view.cast("B") if view.nbytes else memoryview(b"")
        total += rest.nbytes
        while rest:
            if room == 0:
                leaves.append(leaf.digest())
                leaf, room = hashlib.sha256(b"\0"), CHUNK
            leaf.update(rest[:room])
            taken = min(room, len(rest))
            room, rest = room - taken, rest[taken:]
    leaves.append(leaf.digest())
    return total, leaves


def root(kind: str, domain: str, value: object) -> str:
    """Return "<kind>:sha256:<hex>" of the canonical JSON of `value`, kept apart from other uses by `domain`."""
    digest = hashlib.sha256(domain.encode() + b"\0" + canonical_json(value)).hexdigest()
    return f"{kind}:sha256:{digest}"


def weights_root(tensors: Mapping[str, TensorRecord]) -> str:
    """Return the root "gb1:sha256:<hex>" over names, types, shapes and digests of `tensors`."""
    value = {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": tensor.digest}
        for name, tensor in tensors.items()
    }
    return root("gb1", WEIGHTS_DOMAIN, value)


@dataclass(frozen=True)
class Differences:
    """Names of tensors, sorted: in both but not equal, only in the expected set, only in the actual one."""

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def __bool__(self) -> bool:
        """Return whether there is any difference."""
        return bool(self.changed or self.missing or self.extra)


def differences(expected: Mapping[str, TensorRecord], actual: Mapping[str, TensorRecord]) -> Differences:
    """Return how the tensors of two manifests differ, by type, shape and digest."""
    return Differences(
        changed=tuple(sorted(name for name in expected.keys() & actual.keys() if expected[name] != actual[name])),
        missing=tuple(sorted(expected.keys() - actual.keys())),
        extra=tuple(sorted(actual.keys() - expected.keys())),
    )
