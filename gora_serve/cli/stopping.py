"""SIGINT and SIGTERM during long work: the first asks it to stop at a safe point, the second stops it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gora_serve.signals import leave

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"stopping at the next safe point; a second signal stops at once\n"


@contextmanager
def stopping() -> Iterator[Callable[[], int | None]]:
    """While open, keep the first signal; yield the question for it. The second raises as if there were no handler.

    A signal that is ignored, as SIGINT is for work in the background, stays ignored.
    """
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            leave(number)
        received.append(number)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, NOTICE)  # print is not safe inside a handler

    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
