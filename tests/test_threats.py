"""docs/threats.md names tests and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

from gora_serve.cli.main import cli

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "threats.md").read_text(encoding="utf-8")


def test_every_promise_has_a_test_that_exists() -> None:
    promises = TEXT.split("## What is promised")[1].split("## What is not promised")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(
                rf"^(async )?def {test}\(", (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE
            ), test


def test_every_command_exists() -> None:
    named = set(re.findall(r"`gora-serve (\w+)", TEXT))
    assert {"doctor", "hash", "verify"} <= named <= set(cli.commands)
