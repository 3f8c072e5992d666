"""Progress bars on a terminal. Only this file and the tables know rich; it is imported where it shows something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from gora_serve.cli.render import amount, numbers
from gora_serve.progress import Listener, Progress


@contextmanager
def bars() -> Iterator[Listener]:
    """Show a bar for each stage on standard error while open."""
    columns = (
        TextColumn("{task.description:>7}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, TaskID] = {}

        def listen(event: Progress) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = shown.add_task(event.stage, total=event.total, numbers="", amount="")
            task, told = tasks[event.stage], numbers(event.fields)
            shown.update(task, completed=event.done, total=event.total, numbers=told, amount=amount(event))

        yield listen
