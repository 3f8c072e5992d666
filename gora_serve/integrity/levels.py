"""How deep a check went. Every report names its level; only the two that read every byte say "verified"."""

from __future__ import annotations

from enum import StrEnum


class Level(StrEnum):
    """L0: size, times and inode as they were when the bytes were hashed. L1: headers. L2: every byte of the files.
    L3: every byte in memory.
    """

    STAT = "L0 stat"
    HEADER = "L1 header"
    BYTES = "L2 full bytes"
    MEMORY = "L3 memory"

    @property
    def verifies(self) -> bool:
        """Return whether a check of this level may be called a verification."""
        return self in (Level.BYTES, Level.MEMORY)
