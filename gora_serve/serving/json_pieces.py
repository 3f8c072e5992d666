"""Two facts out of JSON that comes in pieces and is never held whole: a string of the outermost object, and the usage.

Pure: bytes in, values out. Memory is bounded whatever the length of the text.
"""

from __future__ import annotations

import json
import re

_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OUTERMOST, _DEEPER = re.compile(rb'["{}\[\]:,]'), re.compile(rb'["{}\[\]]')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')


class TopLevelString:
    """The string that the outermost object has under `key`; of several the last, as Python's parser takes it.

    Texts that are no JSON give some string or none, and no error. Keys and values longer than `longest` bytes are none.
    """

    def __init__(self, key: str, longest: int = 256) -> None:
        self._key, self._longest = key, longest
        self._depth, self._inside, self._escaped, self._is_value = 0, False, False, False
        self._text = b""
        self._last: str | None = None
        self.value: str | None = None

    def feed(self, piece: bytes) -> None:
        """Go on with the next bytes."""
        at = 0
        while at < len(piece):
            at = self._in_string(piece, at) if self._inside else self._between(piece, at)

    def _in_string(self, piece: bytes, at: int) -> int:
        if self._escaped:
            self._escaped = False
            self._keep(piece[at : at + 1])
            return at + 1
        found = _REST_OF_STRING.match(piece, at)
        end = found.end() if found else at
        self._keep(piece[at:end])
        if piece[end : end + 1] == b"\\":  # the last byte: what it escapes is in the next piece
            self._keep(b"\\")
            self._escaped = True
        elif piece[end : end + 1] == b'"':
            self._inside = False
            self._ends()
        return end + 1

    def _between(self, piece: bytes, at: int) -> int:
        found = (_OUTERMOST if self._depth == 1 else _DEEPER).search(piece, at)
        if found is None:
            return len(piece)
        token = found[0]
        if token == b'"':
            self._inside, self._text = True, b""
        elif token in b"{[":
            self._depth += 1
        elif token in b"}]":
            self._depth -= 1
        else:
            self._is_value = token == b":"
        return found.end()

    def _keep(self, text: bytes) -> None:
        if self._depth == 1 and len(self._text) <= self._longest:
            self._text += text[: self._longest + 1]

    def _ends(self) -> None:
        if self._depth != 1:
            return
        text = None
        if len(self._text) <= self._longest:
            try:
                text = str(json.loads(b'"' + self._text + b'"', strict=False))
            except ValueError:
                text = None
        if not self._is_value:
            self._last = text
        elif self._last == self._key:
            self.value = text


class UsageTail:
    """The last usage in a JSON answer or a stream of them: in the last bytes of it, or nowhere."""

    def __init__(self, longest: int = 4096) -> None:
        self._longest, self._tail = longest, b""

    def feed(self, piece: bytes) -> None:
        """Go on with the next bytes."""
        self._tail = (self._tail + piece[-self._longest :])[-self._longest :]

    def tokens(self) -> tuple[int, int] | None:
        """Return (prompt, completion) tokens; an answer that completes nothing (embeddings) has 0 of these.

        Text that a model wrote cannot look like one: its quotes are escaped.
        """
        found = list(_USAGE.finditer(self._tail))
        if not found:
            return None
        rest = self._tail[found[-1].end() :]
        prompt, completion = _PROMPT.search(rest), _COMPLETION.search(rest)
        return (int(prompt[1]), int(completion[1]) if completion else 0) if prompt else None
