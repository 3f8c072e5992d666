"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from shell import environment, gora

from gora_serve.cli.main import cli

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_reference_is_up_to_date() -> None:
    """In a process of its own: click keeps a command's help option as the first context made it."""
    program = f"import runpy; print(runpy.run_path({str(DOCS / 'make_cli.py')!r})['reference'](), end='')"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    written = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert written == made, "run: python docs/make_cli.py"
    assert max(map(len, written.splitlines())) <= 120


@pytest.mark.parametrize("name", ["fit", "serve"])
def test_reference_is_what_help_prints(name: str) -> None:
    """On a terminal that is wide enough."""
    answer = gora(name, "--help", env=environment(COLUMNS="140"))
    printed = "\n".join(line.rstrip() for line in answer.out.splitlines())
    assert f"```text\n{printed}\n```" in (DOCS / "cli.md").read_text(encoding="utf-8")


def test_reference_has_every_command() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(cli.commands)
