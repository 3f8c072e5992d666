"""Our own events and the engine's output as JSON, one object a line: for machines that collect logs.

Every line has time (UTC), level, event and message; what else depends on the event. Keys that clients must have are
taken out of whatever the engine prints.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO

from gora_serve.serving.meter import LOG_MARK

ENGINE = "engine"
KEPT = 200  # lines of the engine, to tell what it said last
LONGEST = 16 << 10  # bytes of a line; a longer one is cut
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class JsonLines:
    """Writes events to a stream, whole lines from any thread. What cannot be written is lost, and ends no work."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def tell(self, event: str, message: str, *, level: str = "info", **fields: object) -> None:
        """Write one line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {"time": now, "level": level, "event": event, "message": message, **fields}
        line = json.dumps(told, default=str).encode() + b"\n"
        with self._lock:
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, or a closed stream
                return


class LogHandler(logging.Handler):
    """Hands what modules log to the lines; `extra={"event": ...}` names the event."""

    def __init__(self, lines: JsonLines) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.tell(getattr(record, "event", "log"), record.getMessage(), level=record.levelname.lower())


class Pump:
    """Reads what the engine prints, and writes it on as JSON lines. What itself is one of our events stays one.

    Such a line begins with a word that only the engine's first process was told, so that no request can forge one.
    """

    def __init__(self, lines: JsonLines, keys: Sequence[str] = (), *, events: JsonLines | None = None) -> None:
        """lines: where the engine's output goes; events: where what itself is an event goes, if elsewhere."""
        self._lines, self._events = lines, events or lines
        self._keys = sorted(filter(None, keys), key=len, reverse=True)  # one may be the beginning of another
        self._mark = secrets.token_hex(16)
        self._last: deque[str] = deque(maxlen=KEPT)
        self._thread: threading.Thread | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What the engine has to know."""
        return {LOG_MARK: self._mark}

    def open(self) -> int:
        """Begin to read; return the descriptor to write to. Its writers close it, and then the reading ends."""
        reading, writing = os.pipe()
        self._thread = threading.Thread(target=self._read, args=(reading,), name="engine-output", daemon=True)
        self._thread.start()
        return writing

    def last(self, timeout: float = 1.0) -> list[str]:
        """Return the last lines. An engine that has ended gets a moment to have been read to its end."""
        if self._thread is not None:
            self._thread.join(timeout)
        return list(self._last)

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as stream:
            for text in without_keys(iter(lambda: stream.readline(LONGEST), b""), self._keys):
                if text.strip():
                    self._line(text)

    def _line(self, text: str) -> None:
        event = _event(text.removeprefix(self._mark)) if text.startswith(self._mark) else None
        if event:
            name = str(event.pop("event"))
            self._events.tell(name, name, **event)
            return
        self._last.append(text)
        level = _LEVEL.search(text[:80])
        self._lines.tell(ENGINE, text, level=level[0].lower() if level else "info")


def without_keys(pieces: Iterable[bytes], keys: Sequence[str]) -> Iterator[str]:
    """Yield the text of lines, or of the pieces of long ones, with [key] for each key, also where it lies across two.

    What may be the beginning of a key is held back at the end of a piece that ends no line.
    """
    held = ""
    back = max(map(len, keys), default=1) - 1
    for piece in pieces:
        text = _COLOR.sub("", held + piece.decode(errors="replace"))
        for key in keys:
            text = text.replace(key, "[key]")
        cut = len(text) if piece.endswith(b"\n") else max(0, len(text) - back)
        text, held = text[:cut], text[cut:]
        yield text.rstrip("\r\n")
    if held:
        yield held


def _event(text: str) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except ValueError:
        return None
    if not isinstance(event, dict) or "event" not in event or event.keys() & {"time", "level", "message"}:
        return None
    return event
