"""Whether the disk has room for an output, asked before work starts."""

from __future__ import annotations

import os
from pathlib import Path

from gora_serve.errors import MachineError
from gora_serve.integrity.targets import UNCHANGED

MARGIN = 64 << 20  # bytes that stay free beside the output: configuration, cards, seals, and other programs


def require_space(target: Path, needed: int) -> None:
    """Raise MachineError (GS-560) unless `needed` bytes, and 64 MiB beside, are free where `target` will be.

    What an output to be replaced takes is not counted: it stays until the new one is whole. Where the system does not
    say what is free nothing is refused.
    """
    place = target.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        status = os.statvfs(place)
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < needed + MARGIN:
        raise MachineError(
            "the disk has no room for the output", code="GS-560", file=target,
            expected=f"{needed + MARGIN} bytes free: {needed} for the output, {MARGIN} to spare",
            actual=f"{free} bytes free", kept=UNCHANGED, hint="free some space, or write to another disk",
        )  # fmt: skip


def size_of_files(folder: Path) -> int:
    """Return the bytes in the files of `folder`, links followed; those in its folders are not counted."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
