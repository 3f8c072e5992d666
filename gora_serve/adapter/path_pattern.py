"""Keys of rank_pattern and alpha_pattern, matched with bounded work. No torch, and none of them is run as it is.

A key out of a foreign file is a regular expression for the end of a module's path. What people write there is names,
dots, digits, alternatives and `.*`; that much is read here, and followed over all positions at once, so that no key
takes longer than its length times the path's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache

LONGEST = 1000  # characters of a key
REPEATS = 3
DEEPEST = 20  # groups in groups
_SPECIAL = "*+?{}()|[]^$\\."
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
}

_LITERAL = re.compile(r"(?:([^*+?{}()|\[\]^$\\.])|\\([^\w]))(?![*+?{])")

Ends = Set[int]  # positions in a path
Step = Callable[[str, Ends], Ends]  # (path, where to begin) -> where it can end


class UnreadableError(ValueError):
    """The key is not of the kind that is read here."""


class PathPattern:
    """A compiled key. Raises UnreadableError for anything but literals, `.`, escapes, \\d, \\w, sets such as [0-3],
    groups of alternatives, anchors, and up to three characters that repeat (`*`, `+`, `?`)."""

    def __init__(self, key: str) -> None:
        if len(key) > LONGEST:
            raise UnreadableError("too long")
        self._key, self._at, self._repeats, self._depth = key, 0, 0, 0
        self._step = self._alternatives()
        if self._at < len(key):
            raise UnreadableError(f"at {self._at}")

    def matches(self, path: str) -> bool:
        """Return whether `(.*\\.)?(key)$` matches the path, which is PEFT's rule."""
        return len(path) in self._step(path, _begins(path))

    def _peek(self) -> str:
        return self._key[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise UnreadableError("it ends early")
        self._at += 1
        return char

    def _alternatives(self) -> Step:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._take()
            branches.append(self._sequence())
        if len(branches) == 1:
            return branches[0]
        return lambda path, begins: set().union(*(branch(path, begins) for branch in branches))

    def _sequence(self) -> Step:
        steps: list[Step] = []
        while self._peek() not in ("", "|", ")"):
            words = self._words()
            if words:
                steps.append(_literally(words))
            else:
                steps.append(self._group() if self._peek() == "(" else self._item())
        return lambda path, begins: _follow(steps, path, begins)

    def _words(self) -> str:
        """Take the literal characters up to the next that is none, or that repeats: most keys are one such run."""
        words = ""
        while found := _LITERAL.match(self._key, self._at):
            words += found.group(1) or found.group(2)
            self._at = found.end()
        return words

    def _group(self) -> Step:
        self._take()
        self._depth += 1
        if self._depth > DEEPEST:
            raise UnreadableError("groups too deep")
        if self._key.startswith("?:", self._at):
            self._at += 2
        inner = self._alternatives()
        self._depth -= 1
        if self._take() != ")" or self._peek() in ("*", "+", "?", "{"):
            raise UnreadableError("a group that repeats")
        return inner

    def _item(self) -> Step:
        char = self._take()
        if char == "^":
            return lambda path, begins: begins & {0}
        if char == "$":
            return lambda path, begins: begins & {len(path)}
        fits = self._fits(char)
        repeat = self._peek()
        if repeat == "{":
            raise UnreadableError("a counted repeat")
        if repeat not in ("*", "+", "?"):
            return lambda path, begins: _one(fits, path, begins)
        self._take()
        self._repeats += 1
        if self._repeats > REPEATS or self._peek() in ("*", "+", "?", "{"):
            raise UnreadableError("too many repeats")
        if repeat == "?":
            return lambda path, begins: begins | _one(fits, path, begins)
        if repeat == "*":
            return lambda path, begins: begins | _many(fits, path, begins)
        return lambda path, begins: _many(fits, path, begins)

    def _fits(self, char: str) -> Callable[[str], bool]:
        if char == ".":
            return lambda _: True
        if char == "\\":
            return self._escaped()
        if char == "[":
            return self._set()
        if char in _SPECIAL:
            raise UnreadableError(f"{char} at {self._at}")
        return char.__eq__

    def _escaped(self) -> Callable[[str], bool]:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            raise UnreadableError(f"\\{char}")
        return char.__eq__

    def _set(self) -> Callable[[str], bool]:
        ranges: list[tuple[str, str]] = []
        while (first := self._take()) != "]":
            if first in "^[\\":
                raise UnreadableError("a set of another kind")
            last = first
            if self._peek() == "-" and self._key[self._at + 1 : self._at + 2] not in ("]", ""):
                self._take()
                last = self._take()
            if last in "[\\" or last < first:
                raise UnreadableError("a set of another kind")
            ranges.append((first, last))
        if not ranges:
            raise UnreadableError("an empty set")
        return lambda char: any(first <= char <= last for first, last in ranges)


@lru_cache(maxsize=8)
def _begins(path: str) -> frozenset[int]:
    """Return where a match may begin: at the start, and after each dot."""
    return frozenset([0, *(index + 1 for index, char in enumerate(path) if char == ".")])


def _literally(words: str) -> Step:
    return lambda path, begins: {begin + len(words) for begin in begins if path.startswith(words, begin)}


def _follow(steps: Sequence[Step], path: str, begins: Ends) -> Ends:
    for step in steps:
        if not begins:
            break
        begins = step(path, begins)
    return begins


def _one(fits: Callable[[str], bool], path: str, begins: Ends) -> Ends:
    return {begin + 1 for begin in begins if begin < len(path) and fits(path[begin])}


def _many(fits: Callable[[str], bool], path: str, begins: Ends) -> Ends:
    """One or more: each position is passed once, whatever the number of beginnings."""
    ends: set[int] = set()
    for begin in sorted(begins):
        while begin < len(path) and begin + 1 not in ends and fits(path[begin]):
            begin += 1
            ends.add(begin)
    return ends


@lru_cache(maxsize=1 << 14)
def compile_key(key: str) -> PathPattern | None:
    """Return the compiled key, or None for one that is not read."""
    try:
        return PathPattern(key)
    except UnreadableError:
        return None
