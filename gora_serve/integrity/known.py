"""Manifests that this user's commands made, kept by weights root: to say which tensors differ when a base is refused.

A stored manifest proves itself, by its own root, so it is as good as a fresh one wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gora_serve.errors import GoraError
from gora_serve.integrity.cache import cache_folder, read_private, write_private
from gora_serve.integrity.canonical import canonical_json, parse_json
from gora_serve.integrity.manifest import Manifest, TensorRecord, hash_model
from gora_serve.progress import Listener, silent

KEPT = 64  # manifests; the oldest go first


def _place(weights_root: str) -> Path:
    return cache_folder() / "manifests" / f"{weights_root.rpartition(':')[2]}.json"


def remember_manifest(manifest: Manifest) -> None:
    """Keep a manifest in the user's cache. Nothing happens where that cannot be written."""
    path = _place(manifest.roots.weights)
    if not path.exists():
        write_private(path, canonical_json(manifest.to_json()), kept=KEPT)


def hash_base(directory: Path, *, listen: Listener = silent) -> Manifest:
    """Hash a base as `hash_model` does, and remember its manifest."""
    manifest = hash_model(directory, listen=listen)
    remember_manifest(manifest)
    return manifest


def known_tensors(weights_root: str, base: str | None = None) -> Mapping[str, TensorRecord] | None:
    """Return the tensors of the base with this root, if they can be known here: from the user's cache, or from `base`,
    what the adapter calls its base, where that is a model folder and still has this root.
    """
    path = _place(weights_root)
    raw = read_private(path)
    with suppress(GoraError, OSError):
        if raw is not None:
            manifest = Manifest.from_json(parse_json(raw, path), file=path)
            if manifest.roots.weights == weights_root:
                return manifest.tensors
    with suppress(GoraError, OSError):
        if base and (Path(base) / "config.json").is_file():
            manifest = hash_model(Path(base))
            return manifest.tensors if manifest.roots.weights == weights_root else None
    return None
