"""The folder of a run while it is being written: the main process alone writes into it, all may read."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.integrity.files import write_json, write_text
from gora_serve.integrity.staging import fsync_path

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """The unfinished run at `path`. Where `writes` is false, nothing is written."""

    path: Path
    writes: bool

    def json(self, name: str, value: Mapping[str, Any]) -> None:
        if self.writes:
            write_json(self.path / name, value)

    def metrics(self, value: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; a number that is not finite becomes null."""
        if self.writes:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
            with (self.path / METRICS).open("a") as file:
                file.write(json.dumps(finite) + "\n")

    def sync_metrics(self) -> None:
        """Wait until the lines so far are on disk."""
        if self.writes and (self.path / METRICS).exists():
            fsync_path(self.path / METRICS)

    def cut_metrics(self, step: int | None) -> None:
        """Drop the lines after `step` (None: all), and what a killed process left of its last line."""
        path = self.path / METRICS
        if not self.writes or not path.exists():
            return
        if step is None:
            path.unlink()
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            at = _step_of(line)
            if at is None or at > step:
                break
            kept.append(line)
        write_text(path, "".join(kept))


def _step_of(line: str) -> int | None:
    """The step of a whole line of metrics.jsonl, or None for a torn one."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
