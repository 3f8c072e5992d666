"""Looking at a watched directory: which folders are in it, and what would differ if anything in them were written.

Names with a dot first are not looked at: uploads and atomic writers use them. Links may lead to other places of the
directory (current -> .releases/7), never out of it. No file is opened here.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gora_serve.errors import BindingError, GoraError, MachineError
from gora_serve.integrity.reading import identity, unreadable
from gora_serve.serving.changes import Stamp


@dataclass(frozen=True)
class Seen:
    """One entry of the directory. `problem`: why it is not even read."""

    path: Path
    stamp: Stamp
    problem: GoraError | None = None


def look_at(folder: Path) -> dict[str, Seen]:
    """Return the entries by name. Raises MachineError (GS-5600) where the directory itself cannot be read."""
    try:
        root = folder.resolve(strict=True)
        names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    except OSError as err:
        raise MachineError(
            f"the directory of adapters cannot be read: {err.strerror or err}", code="GS-5600", file=folder,
            hint="make it, or check its permissions and whether it is mounted",
        ) from err  # fmt: skip
    found = {name: _look(folder / name, root) for name in names}
    return {name: seen for name, seen in found.items() if seen is not None}


def _look(path: Path, root: Path) -> Seen | None:
    """Return None for what vanished meanwhile."""
    try:
        own = identity(path.lstat())
    except OSError:
        return None
    outside = _leads_out(path, root)
    if outside is not None:
        return Seen(path, own, outside)
    try:
        if not path.is_dir():
            return Seen(path, own)  # no adapter, as its reader will say
        parts = tuple(_parts(path))
    except FileNotFoundError:
        return None
    except OSError as err:
        return Seen(path, own, unreadable(path, err))
    problems = [problem for name, *_ in parts if (problem := _leads_out(path / name, root)) is not None]
    return Seen(path, (own, str(path.resolve()), parts), problems[0] if problems else None)


def _parts(folder: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    """Yield name and identity of each entry, for links also of what they lead to."""
    for path in sorted(folder.iterdir()):
        try:
            own = path.lstat()
        except FileNotFoundError:
            continue
        target = None
        if stat.S_ISLNK(own.st_mode):
            try:
                target = identity(path.stat())
            except OSError:
                target = ()
        yield path.name, identity(own), target


def _leads_out(path: Path, root: Path) -> GoraError | None:
    if not path.is_symlink():
        return None
    try:
        target = path.resolve()
        inside = target.is_relative_to(root)
    except (OSError, RuntimeError):  # a link to itself
        target, inside = path, False
    if inside:
        return None
    return BindingError(
        "a link that leads out of the watched directory", code="GS-4604", file=path, expected=f"a place in {root}",
        actual=str(target), hint="copy the adapter into the directory",
    )  # fmt: skip
