"""How much memory a container leaves us: the kernel ends what takes more, however much the machine has free."""

from __future__ import annotations

import math
import re
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")  # of version 2, as a container sees its own


def memory_limit() -> float:
    """Return the bytes that all processes of this container may use; infinity where nothing limits them."""
    return _number("memory.max")


def memory_left() -> float:
    """Return how many of them are not in use. Cached pages of files that nobody uses at the moment count as free."""
    limit, used = memory_limit(), _number("memory.current")
    if math.inf in (limit, used):
        return limit
    cached = re.search(r"^inactive_file (\d+)$", _text("memory.stat"), re.MULTILINE)
    return max(0.0, limit - used + (int(cached[1]) if cached else 0))


def _number(name: str) -> float:
    text = _text(name).strip()
    return float(text) if text.isdecimal() else math.inf


def _text(name: str) -> str:
    try:
        return (GROUP / name).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
