"""Running the command line as a user does: in a process of its own, or in this one where only the answer counts.

`gora` starts a process. `gora_here` calls the same entry point here, which saves the seconds that importing torch
takes; exit code, standard output and standard error are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SMALL = ("--probe-steps", "2", "--batch-size", "4", "--max-length", "128", "--rank", "2")
TIMEOUT = 300.0


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def gs(self) -> str | None:
        """The GS code of the error, if there is one."""
        found = re.search(r"^error\[(GS-\d{3,4})\]", self.err, re.MULTILINE)
        return found.group(1) if found else None

    def field(self, name: str) -> str | None:
        """A line of the error's block, such as file or try."""
        found = re.search(rf"^  {name}: (.*)$", self.err, re.MULTILINE)
        return found.group(1) if found else None


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, on one thread and without a terminal's width."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "gora_serve", *map(str, words)]


def gora(*words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command in a process of its own."""
    done = subprocess.run(
        command(*words), cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def gora_here(*words: object) -> Answer:
    """Run a command in this process, through the entry point that turns errors into exit codes."""
    from gora_serve.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python does outside of tests
            warnings.simplefilter("ignore", FutureWarning)
            code = main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Answer(code, out.getvalue(), err.getvalue())


def snapshot(*folders: Path) -> dict[str, str]:
    """The SHA-256 of every file (the target of every link) below the folders, and every empty folder."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                found[str(path)] = f"link to {path.readlink()}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "folder"
    return found


def fit_words(base: object, data: object, output: object, *more: object) -> Sequence[object]:
    """The words of a fit of two steps."""
    return ("fit", base, "--data", data, "--output", output, *SMALL, "--steps", "2", *more)
