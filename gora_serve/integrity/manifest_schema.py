"""What a model folder held, as a value and as JSON: the schema `gora-serve/base-manifest/1`.

`Manifest.from_json` reads a stored one and checks it against its own root. No model is opened here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gora_serve.errors import InputError
from gora_serve.integrity.digest import CHUNK, WEIGHTS_DOMAIN, TensorRecord, digest_of_leaves, weights_root
from gora_serve.integrity.headers import tensor_nbytes

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
    weights = root_text(value["weights_root"])
    if weights is None:
        raise ValueError("weights_root")
    roots = Roots(weights, root_text(value["config_root"]), root_text(value["tokenizer_root"]))
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


def root_text(value: object) -> str | None:
    """Return a root as a file states it, None where there is none. Raises TypeError for anything else."""
    if value is not None and not (isinstance(value, str) and _ROOT.fullmatch(value)):
        raise TypeError(f"{value!r} is not a root")
    return value
