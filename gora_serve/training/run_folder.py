"""The folder of a run while it is being written: the main process alone writes into it, all may read."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.integrity.files import write_json, write_text
from gora_serve.integrity.staging import fsync_path

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
Metrics = Callable[[Mapping[str, Any]], None]  # takes a line of metrics.jsonl


def nowhere(_: Mapping[str, Any]) -> None:
    """Take a line and do nothing with it."""


@dataclass(frozen=True)
class RunFolder:
    """The unfinished run at `path`. Where `writes` is false, nothing is written. also: takes the metrics too."""

    path: Path
    writes: bool
    also: Metrics = nowhere

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        if self.writes:
            write_json(self.path / name, value)

    def metrics(self, value: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; a number that is not finite becomes null."""
        if self.writes:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
            try:
                with (self.path / METRICS).open("a") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as err:  # of a full disk; it does not know the file's name by itself
                raise OSError(err.errno, err.strerror, str(self.path / METRICS)) from err
            self.also(value)

    def sync_metrics(self) -> None:
        """Wait until the lines so far are on disk."""
        if self.writes and (self.path / METRICS).exists():
            fsync_path(self.path / METRICS)

    def cut_metrics(self, step: int | None) -> None:
        """Drop the lines after `step` (None: all), and what is no line of ours, as a killed process's last one.

        Warns where lines of steps up to `step` are lost.
        """
        path = self.path / METRICS
        if not self.writes:
            return
        if step is None:
            path.unlink(missing_ok=True)
            return
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = [(_step_of(line), line) for line in text.splitlines(keepends=True)]
        kept = [(at, line) for at, line in lines if at is not None and at <= step]
        write_text(path, "".join(line for _, line in kept))
        lost = len(set(range(1, step + 1)) - {at for at, _ in kept})
        if lost:
            log.warning("%s has lost the lines of %d of the %d steps before the checkpoint", path, lost, step)


def _step_of(line: str) -> int | None:
    """The step of a whole line of metrics.jsonl, or None for a torn one."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
