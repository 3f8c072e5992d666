"""Rows of JSONL, JSON, CSV and Parquet files. A fault is named by file and line or row."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gora_serve.errors import InputError, first_line
from gora_serve.training.encode import Row


def json_lines(path: Path) -> list[Row]:
    """Parse line by line, so that a fault has a line number; blank lines are skipped."""
    rows = []
    for number, line in enumerate(_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise InputError(
                "not JSON",
                code="GS-377",
                hint="correct the line: one JSON object a line",
                file=f"{path}:{number}",
                actual=str(err),
            ) from err
        if not isinstance(value, dict):
            raise InputError(
                "not a JSON object",
                code="GS-377",
                hint="correct the line: one JSON object a line",
                file=f"{path}:{number}",
                actual=line[:60],
            )
        rows.append(Row(value, f"{path}:{number}"))
    return rows


def json_rows(path: Path) -> list[Row]:
    """Read a list of objects; or one object a line, as JSONL has them."""
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        if _is_object(text.lstrip().partition("\n")[0]):
            return json_lines(path)
        raise _unreadable(path, str(err)) from err
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, dict) for one in values):
        raise _unreadable(path, "not a list of objects")
    return numbered(values, str(path))


def csv_rows(path: Path) -> list[Row]:
    """Read comma-separated values below a line of names; every value is text.

    A row of more or fewer fields than there are names is refused: a comma without quotes would move its text into
    another column.
    """
    found = []
    with _fields_of_any_size():
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        try:
            names, *rows = [row for row in reader if len(row) > 1 or "".join(row).strip()] or [[]]
        except csv.Error as err:
            raise _unreadable(path, f"line {reader.line_num}: {err}") from err
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _unreadable(path, f"the first line names {twice[0]!r} twice")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise InputError(
                "a row has another number of fields than the first line names", code="GS-375",
                file=f"{path}:row {number}", expected=len(names), actual=len(row),
                hint='put text that holds commas, quotes or line breaks between double quotes: "Hello, world"',
            )  # fmt: skip
        found.append(dict(zip(names, row, strict=True)))
    return numbered(found, str(path))


def parquet_rows(path: Path) -> list[Row]:
    """Read a Parquet file through `datasets`."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:  # the usual cache goes by time stamps, and keeps copies of data
            files = str(path.resolve())
            rows = list(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache))
    except (DatasetGenerationError, ValueError, OSError) as err:
        raise _unreadable(path, first_line(err.__cause__ or err)) from err
    return numbered(rows, str(path))


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".jsonl": json_lines, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows,
}  # fmt: skip


def numbered(values: Sequence[Mapping[str, Any]], source: str) -> list[Row]:
    """Name each row by its number, from 1."""
    return [Row(value, f"{source}:row {number}") for number, value in enumerate(values, start=1)]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as err:
        place = err.object[: err.start].count(b"\n") + 1
        raise InputError("not UTF-8", code="GS-376", hint="convert the file to UTF-8", file=f"{path}:{place}") from err


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    """The csv module refuses fields of more than 128 KiB otherwise."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _unreadable(path: Path, actual: str) -> InputError:
    return InputError(
        f"cannot be read as {path.suffix[1:]}", code="GS-375", file=path,
        hint="check that the file is what its ending says", actual=actual,
    )  # fmt: skip
