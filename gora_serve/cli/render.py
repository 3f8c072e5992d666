"""What people see: results on standard output, as lines and tables or as JSON, and talk on standard error."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TextIO

from gora_serve.errors import GoraError, MachineError, printable

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Summary:
    """A result: lines to show, tables to show, and the same as a JSON value."""

    value: Mapping[str, Any]
    lines: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def emit(summary: Summary, *, as_json: bool) -> None:
    """Print a result on standard output. Only the first of several processes speaks."""
    if speaks():
        with _reader_may_go():
            _print(summary, as_json=as_json)


def answer(summary: Summary, refused: GoraError | None, *, as_json: bool) -> int:
    """Print what a check found and, where the answer is no, the error that says so: with --json among the same fields.

    Returns the exit status.
    """
    told = refused.to_json() if refused else {}
    emit(replace(summary, value={**summary.value, **told}), as_json=as_json)
    for line in str(refused).splitlines() if refused else ():
        say(line)
    return refused.exit_code if refused else 0


def _print(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(finite(summary.value), indent=2, allow_nan=False))
        return
    for line in summary.lines:
        print(printable(line))
    if summary.tables:
        from gora_serve.cli.tables import print_tables  # rich takes 30 ms to import

        print_tables(summary.tables)


def finite(value: object) -> object:
    """Return a JSON value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


@contextmanager
def _reader_may_go() -> Iterator[None]:
    """Let output that nobody reads any more (`| head`) vanish. It is no error: 1 means that bytes differ.

    Raises MachineError (GS-507) where standard output is closed, or its disk is full.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except OSError as err:
        discard(sys.stdout)
        raise MachineError(
            f"the result cannot be printed: {err.strerror or err}", code="GS-507", file="standard output",
            kept="the work is done, and what it wrote is in place",
            hint="redirect standard output to a file that can be written",
        ) from err  # fmt: skip


def discard(stream: TextIO | None) -> None:
    """Send what is still buffered for a standard stream, and what follows, nowhere."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a line of talk on standard error."""
    if speaks():
        _talk(printable(text))


def _talk(text: str) -> None:
    """Print on standard error, if anybody can hear it: a full disk there ends no work."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def speaks() -> bool:
    """Whether this process is the one of several that prints."""
    return os.environ.get("RANK", "0") == "0"
