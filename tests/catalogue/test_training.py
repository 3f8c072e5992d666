"""Faults 69 to 76: training and signals. Most are tested where training is; here, what nothing else asserts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from shell import command, environment, fit_words

from catalogue.conftest import Place


def test_fit_starts_no_process_that_could_be_orphaned(
    place: Place, tiny_data: Path, events: Callable[..., list[tuple[object, ...]]]
) -> None:
    """75: there is no worker for the kernel to kill but the process itself, whose death the next --resume survives."""
    place.leaves = [place.out]
    place.accepts(*fit_words(place.base, tiny_data, place.out))
    started = events("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
    assert [args for args in started if "lscpu" not in str(args)] == []


@pytest.mark.parametrize("words", [("hash", "--json"), ("verify", "--json")])
def test_nobody_reads_the_answer(place: Place, words: tuple[str, str]) -> None:
    """76: as with `| head`: no traceback, no word, and the exit status is that of the work."""
    manifest = place.folder / "manifest.json"
    place.accepts("hash", place.base, "--output", manifest)
    place.leaves = [manifest]
    more = ("--manifest", manifest) if words[0] == "verify" else ()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command(words[0], place.base, *more, words[1]), stdout=writer, stderr=subprocess.PIPE, text=True,
            env=environment(), check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Pipe" not in done.stderr


def test_a_refusal_that_nobody_reads_keeps_its_status(place: Place) -> None:
    """76: both streams are closed."""
    place.run("--version")
    shell = " ".join(map(str, command("hash", place.folder / "nothing"))) + " >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", shell], env=environment(), check=False).returncode == 5


def test_a_row_that_is_none(place: Place, tiny_data: Path) -> None:
    """74: by file and line; the kinds of bad rows are in cli's tests."""
    rows = tiny_data.read_text().splitlines()
    data = place.folder / "rows.jsonl"
    data.write_text("\n".join([*rows[:2], json.dumps({"prompt": 3}), *rows[2:]]) + "\n")
    place.refuses(tuple(fit_words(place.base, data, place.out)), 3, "GS-378", file=f"{data}:3")
