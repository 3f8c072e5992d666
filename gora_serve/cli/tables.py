"""Tables on standard output, through rich."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


class _Output(Console):
    """Rich's console, without its exit code 1 when the reader has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables as wide as the terminal is, or as COLUMNS says; else, where there is none, at 120 columns."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # small curves and lines are not in every encoding
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    console = _Output(width=None if known else 120, highlight=False)
    for table in tables:
        _cut_nothing(table, console.width)
        console.print(table)


def _cut_nothing(table: Table, width: int) -> None:
    """Break cells that are too long into lines; not so the names of what the rows are about, where there is room."""
    for column in table.columns:
        column.overflow = "fold"
    names = [str(cell) for cell in table.columns[0].cells]
    table.columns[0].no_wrap = all(" " not in name and len(name) <= width // 2 for name in names)
