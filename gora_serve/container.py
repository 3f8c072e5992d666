"""How much memory a container leaves us: the kernel ends what takes more, however much the machine has free."""

from __future__ import annotations

import math
import re
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")  # as a container sees its own
# Of versions 2 and 1: the limit, what is used, and in memory.stat the cached pages that nobody uses at the moment.
FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
NO_LIMIT = 2**62  # bytes; version 1 writes a number near 2^63 where there is none


def memory_limit() -> float:
    """Return the bytes that all processes of this container may use; infinity where nothing limits them."""
    return min(_number(names[0]) for names in FILES)


def memory_left() -> float:
    """Return how many of them are not in use. Cached pages of files that nobody uses at the moment count as free."""
    return max(0.0, min(_left(*names) for names in FILES))


def _left(most: str, used: str, more: str, cached: str) -> float:
    limit, taken = _number(most), _number(used)
    if math.inf in (limit, taken):
        return limit
    found = re.search(rf"^{cached} (\d+)$", _text(more), re.MULTILINE)
    return limit - taken + (int(found[1]) if found else 0)


def _number(name: str) -> float:
    text = _text(name).strip()
    return float(text) if text.isdecimal() and int(text) < NO_LIMIT else math.inf


def _text(name: str) -> str:
    try:
        return (GROUP / name).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
