"""Names of tensors that a user gave by --leave-out and --carry: parts of names, or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gora_serve.errors import UsageError

LEFT_OUT = "left out by --leave-out"


class Patterns:
    """What was given to one option, and which of it matched a tensor."""

    def __init__(self, option: str, patterns: Iterable[str]) -> None:
        """Raises UsageError (GS-236) for what is no regular expression."""
        self.option = option
        try:
            self.patterns = {pattern: re.compile(pattern) for pattern in patterns}
        except re.error as err:
            raise UsageError(
                f"{option} is no regular expression", code="GS-236", actual=f"{err.pattern!r}",
                hint="write a part of the tensor's name; quote special characters by a backslash",
            ) from err  # fmt: skip
        self.unused = set(self.patterns)

    def match(self, tensor: str) -> bool:
        matching = [pattern for pattern, compiled in self.patterns.items() if compiled.search(tensor)]
        self.unused -= set(matching)
        return bool(matching)

    def check(self) -> None:
        """Raise UsageError (GS-237) if something that was given has matched nothing."""
        if self.unused:
            raise UsageError(
                f"{self.option} names no tensor that it could mean", code="GS-237",
                actual=", ".join(sorted(self.unused)),
                hint="write a part of the tensor's name, or a regular expression",
            )  # fmt: skip
