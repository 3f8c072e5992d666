"""Whether an adapter that nothing binds to a base names another one as its own, in base_model_name_or_path.

A name proves nothing, so that the right one is not enough to be trusted; but a wrong one is enough to be refused, until
a person says with `bind` that it is this base all the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from gora_serve.errors import BindingError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.manifest import Manifest, hash_model
from gora_serve.serving.adapter_dir import AdapterDir


def short_name(name: str) -> str:
    """Return what a model is called whatever its owner and its folder: the last part of an id or a path.

    A snapshot in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) is called NAME.
    """
    path = Path(name.rstrip("/"))
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2].casefold()
    return path.name.casefold()


def names_of(base: Path, *given: str) -> tuple[str, ...]:
    """Return what a base may be called: as it was given, by its folder, and as its configuration says."""
    config = read_json(base / "config.json")
    said = config.get("_name_or_path") if isinstance(config, dict) else None
    return (*given, str(base.resolve()), *([said] if isinstance(said, str) and said else []))


def other_base(adapter: AdapterDir, base: Path, manifest: Manifest, names: Sequence[str]) -> Iterator[BindingError]:
    """Yield the error (GS-4352) where the adapter names another model than this base.

    A folder that is there is hashed, and compared by its weights; anything else is compared by name.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return
    folder = Path(named)
    if (folder / "config.json").is_file():
        same = folder.samefile(base) or hash_model(folder).roots.weights == manifest.roots.weights
    else:
        same = short_name(named) in {short_name(name) for name in names}
    if not same:
        output = adapter.path.with_name(f"{adapter.path.name}-bound")
        words = ("gora-serve", "bind", str(adapter.path), "--base", str(base), "--output", str(output))
        yield BindingError(
            "the adapter says that it belongs to another model", code="GS-4352", file=adapter.config_file,
            tensor="base_model_name_or_path", expected=" or ".join(dict.fromkeys(map(short_name, names))),
            actual=named, hint=f"give that model; if you know that it is this one: {shlex.join(words)}",
        )  # fmt: skip
