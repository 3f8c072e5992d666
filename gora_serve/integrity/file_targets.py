"""Where a single file may be written: never into a model or a sealed folder, and never over a file of another kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from gora_serve.errors import UsageError
from gora_serve.integrity.files import refuse_existing
from gora_serve.integrity.targets import SEAL, UNCHANGED, is_model, model_in_the_way

Kind = Literal["manifest", "statement", "ranks", "picture", "page"]
HEAD = 4096  # bytes that a kind is known by
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"%PDF-")

# Whether the beginning of a file is that of this kind, as we write it.
RECOGNIZED: Mapping[Kind, Callable[[bytes], bool]] = {
    "manifest": lambda head: b'"schema": "gora-serve/base-manifest/' in head,
    "statement": lambda head: b'"https://in-toto.io/Statement/' in head,
    "ranks": lambda head: b'"schema": "gora-serve/ranks/' in head,
    "picture": lambda head: head.startswith(_PICTURES) or b"<svg" in head,
    "page": lambda head: b"- gora-serve</title>" in head,
}


def check_file(path: Path, kind: Kind, *, overwrite: bool) -> None:
    """Say before work starts that a file may not be written at `path`; changes nothing.

    Raises OutputError (GS-601) where something is there and `overwrite` is not set, UsageError: GS-256 in a model's
    folder, GS-258 in a finished output, GS-259 where what would be replaced is of another kind, or no file.
    """
    for folder in Path(os.path.realpath(path)).parents:
        if is_model(folder):
            raise model_in_the_way(path, f"the output lies in a model folder, {folder}")
        if (folder / SEAL).is_file():
            raise UsageError(
                f"the output lies in a finished output, {folder}", code="GS-258", file=path, kept=UNCHANGED,
                hint="choose a place outside of it: its own manifest would no longer hold",
            )  # fmt: skip
    if not overwrite:
        refuse_existing(path)
    elif os.path.lexists(path) and not _is_of(path, kind):
        raise UsageError(
            f"what would be replaced is no {kind} of ours", code="GS-259", file=path, kept=UNCHANGED,
            hint="choose another output, or remove what is there",
        )  # fmt: skip


def _is_of(path: Path, kind: Kind) -> bool:
    """Return whether a file is of this kind, or empty."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD)
    except OSError:
        return False
    return not head or RECOGNIZED[kind](head)
