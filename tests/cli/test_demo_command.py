"""What `demo` refuses before it trains anything; the demo itself is in the end-to-end tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shell import gora_here

from gora_serve.demo import DATA, TASKS


@pytest.mark.parametrize(
    ("rows", "code", "status"),
    [
        (None, "GS-525", 5), ("", "GS-525", 5), ("{\n", "GS-377", 3), ('{"prompt": "x"}\n', "GS-378", 3),
        ('{"prompt": "x", "completion": 7}\n', "GS-378", 3),
    ],
)  # fmt: skip
def test_rows_to_ask_are_looked_at_before_anything_is_made(
    tmp_path: Path, rows: str | None, code: str, status: int
) -> None:
    for task in TASKS:
        shutil.copytree(DATA / task, tmp_path / "data" / task)
    file = tmp_path / "data" / TASKS[1] / "test.jsonl"
    file.unlink()
    if rows is not None:
        file.write_text(rows)
    answer = gora_here("demo", "--output", str(tmp_path / "out"), "--data", str(tmp_path / "data"))
    assert (answer.code, answer.gs) == (status, code)
    assert str(file) in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--prompts", "--steps", "--rank"])
def test_at_least_one_of_each(option: str, tmp_path: Path) -> None:
    assert gora_here("demo", "--output", str(tmp_path / "out"), option, "0").code == 2
