"""SIGINT and SIGTERM raise; and what they raised is raised again where a library swallowed it.

Libraries in C may turn the exception into one of their own (torch does, while it reads a tensor), which the code around
them takes for a fault of the file or of the model. What is made after that must not be published.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_came: list[int] | None = None  # None outside `leaving_on_signals`


def leave(number: int) -> NoReturn:
    """Note the signal, and raise what leads out through the usual clean-up, to exit status 128 + its number."""
    if _came is not None:
        _came.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _leave(number: int, _: FrameType | None) -> None:
    leave(number)


def came() -> int | None:
    """Return the first signal that raised inside `leaving_on_signals`, or None."""
    return _came[0] if _came else None


def leave_if_asked() -> None:
    """Raise again for a signal that came, where its exception is not on its way any more.

    Nothing happens in clean-up on the way out, nor in other threads than the main one, where signals do not raise.
    """
    leaving = isinstance(sys.exception(), KeyboardInterrupt | SystemExit)
    if _came and not leaving and threading.current_thread() is threading.main_thread():
        leave(_came[0])


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """While open, SIGINT and SIGTERM raise; SIGINT not where it is ignored, as for work in the background."""
    global _came
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _came = []
    signal.signal(signal.SIGTERM, _leave)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _came = None
