"""Whether an adapter that nothing binds to a base names another one than that which is served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gora_serve.errors import BindingError
from gora_serve.integrity.manifest import Manifest
from gora_serve.integrity.named_base import KEY, another_base, is_another
from gora_serve.serving.adapter_dir import AdapterDir


def other_base(adapter: AdapterDir, base: Path, manifest: Manifest, names: Sequence[str]) -> Iterator[BindingError]:
    """Yield the error (GS-4352) where the adapter names another model than this base, by `is_another`."""
    named = adapter.config.get(KEY)
    if isinstance(named, str) and named and is_another(named, base, lambda: manifest.roots.weights, names):
        yield another_base(adapter.path, adapter.config_file, named, base, names)
