"""Whether an adapter that nothing binds to a base names another one as its own, in base_model_name_or_path.

A name proves nothing, so that the right one is not enough to be trusted; but a wrong one is enough to be refused, until
a person says with `bind` that it is this base all the same. The one place for it: `serve` and `merge` ask here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from gora_serve.errors import BindingError, GoraError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.manifest import hash_model

KEY = "base_model_name_or_path"


def short_name(name: str) -> str:
    """Return what a model is called whatever its owner and its folder: the last part of an id or a path.

    A snapshot in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) is called NAME. The path may be one of Windows.
    """
    path = Path(name.replace("\\", "/").rstrip("/"))
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2].casefold()
    return path.name.casefold()


def names_of(base: Path, *given: str) -> tuple[str, ...]:
    """Return what a base may be called: as it was given, by its folder, and as its configuration says."""
    config = read_json(base / "config.json")
    said = config.get("_name_or_path") if isinstance(config, dict) else None
    return (*given, str(base.resolve()), *([said] if isinstance(said, str) and said else []))


def is_another(named: str, base: Path, weights_root: Callable[[], str], names: Sequence[str]) -> bool:
    """Tell whether this is the name of another model than `base`, which is called `names`.

    A model's folder that is there is hashed, and compared by its weights; anything else, also a folder whose weights
    cannot be hashed (pickles, an interrupted download), is compared by its short name.
    """
    folder = Path(named)
    if os.path.isfile(folder / "config.json"):  # noqa: PTH113 - no error for a name that no disk can hold
        if folder.samefile(base):
            return False
        root = _root_of(folder)
        if root is not None:
            return root != weights_root()
    return short_name(named) not in {short_name(name) for name in names}


def _root_of(folder: Path) -> str | None:
    try:
        return hash_model(folder).roots.weights
    except GoraError:  # nobody gave this folder: what is wrong with it is no fault of what was given
        return None


def another_base(adapter: Path, file: Path, named: str, base: Path, names: Sequence[str]) -> BindingError:
    """Return the error (GS-4352) for an adapter that names another model. file: its adapter_config.json."""
    place = adapter.resolve() if adapter.name in ("", "..") else adapter
    in_cache = place.parent.name == "snapshots"  # of the hub, where nothing else belongs
    output = Path(f"{short_name(str(place))}-bound") if in_cache else place.parent / f"{place.name}-bound"
    words = ("gora-serve", "bind", str(adapter), "--base", str(base), "--output", str(output))
    return BindingError(
        "the adapter says that it belongs to another model", code="GS-4352", file=file, tensor=KEY,
        expected=" or ".join(dict.fromkeys(map(short_name, names))), actual=named,
        hint=f"give that model; if you know that it is this one: {shlex.join(words)}",
    )  # fmt: skip
