"""Where long work stands, on standard error: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gora_serve.cli.render import say, speaks
from gora_serve.progress import Listener, Progress, silent

QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


@contextmanager
def watching() -> Iterator[Listener]:
    """Show progress on standard error while open. Only the first of several processes does."""
    if not speaks():
        yield silent
    elif sys.stderr is not None and sys.stderr.isatty():
        with _bars() as listen:
            yield listen
    else:
        yield _lines()


def quiet_libraries() -> None:
    """Keep what libraries say of their progress off standard error, before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops"):  # PEFT imports it, and it talks of kernels
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _bars() -> Iterator[Listener]:
    """Show a bar for each stage while open."""
    from rich.console import Console  # rich takes 30 ms to import
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:>7}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, TaskID] = {}

        def listen(event: Progress) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = shown.add_task(event.stage, total=event.total, numbers="", amount="")
            task, told = tasks[event.stage], _numbers(event.fields)
            shown.update(task, completed=event.done, total=event.total, numbers=told, amount=_amount(event))

        yield listen


def _lines() -> Listener:
    shown: dict[str, float] = {}

    def listen(event: Progress) -> None:
        now = time.monotonic()
        last = event.done == event.total
        if not last and now - shown.get(event.stage, now - QUIET_SECONDS) < QUIET_SECONDS:
            return
        shown[event.stage] = now
        say(f"{event.stage} {_amount(event)} {_numbers(event.fields)}".rstrip())

    return listen


def _amount(event: Progress) -> str:
    """How far a stage is: bytes are told in MB."""
    if event.in_bytes:
        return f"{event.done / 1e6:.0f}/{event.total / 1e6:.0f} MB"
    return f"{event.done}/{event.total}"


def _numbers(fields: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in fields.items())
