"""Tables on standard output, through rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


class _Output(Console):
    """Rich's console, without its exit code 1 when the reader has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables as wide as the terminal is, or 120 columns where there is none."""
    console = _Output(width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in tables:
        console.print(table)
