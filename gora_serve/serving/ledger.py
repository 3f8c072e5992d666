"""What the server's parent knows of its models and the engine does not: written by the parent, read in the engine.

A small JSON file beside the one that says whether the server is ready. Whoever adds, replaces, refuses or removes an
adapter while the server runs says so here.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gora_serve.errors import GoraError, printable

if TYPE_CHECKING:
    from gora_serve.serving.plan import ServedAdapter

LEDGER = "GORA_SERVE_LEDGER"
_LONGEST = 500  # characters of an error


class Ledger:
    """The file, and what is in it. Times are seconds since 1970."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._began = time.time()
        self._told: dict[str, Any] = {"models": {}, "failures": {}, "start_seconds": None}

    def serves(self, base: str, adapters: Sequence[ServedAdapter]) -> None:
        """Say what the server starts with."""
        models = {base: {"kind": "base"}} | {adapter.name: _entry(adapter) for adapter in adapters}
        self._write(models={name: {**entry, "since": time.time()} for name, entry in models.items()})

    def ready(self) -> None:
        """Say that the server is ready: all that it serves, it serves from now on."""
        now = time.time()
        models = {name: {**entry, "since": now} for name, entry in self._told["models"].items()}
        self._write(models=models, start_seconds=now - self._began)

    def added(self, adapter: ServedAdapter, seconds: float) -> None:
        """Say that an adapter, or another version of one, is served now; loading it took so many seconds."""
        entry = {**_entry(adapter), "since": time.time(), "load_seconds": seconds}
        self._write(models=self._told["models"] | {adapter.name: entry})

    def removed(self, name: str) -> None:
        """Say that an adapter is no longer served."""
        self._write(models={kept: entry for kept, entry in self._told["models"].items() if kept != name})

    def refused(self, name: str, err: GoraError) -> None:
        """Say that an adapter, or another version of one, was refused; an older version goes on being served."""
        error = printable(f"[{err.code}] {err.what}")[:_LONGEST]
        failures, models = self._told["failures"], self._told["models"]
        if name in models:
            models = models | {name: {**models[name], "error": error}}
        self._write(failures=failures | {name: failures.get(name, 0) + 1}, models=models)

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._told |= changes
            temporary = self.file.with_suffix(".new")
            temporary.write_text(json.dumps(self._told), encoding="utf-8")
            temporary.replace(self.file)


def _entry(adapter: ServedAdapter) -> dict[str, object]:
    return {
        "kind": "adapter", "root": adapter.root, "form": adapter.form, "rank": adapter.max_rank,
        "verify_seconds": adapter.verify_seconds,
    }  # fmt: skip


def read_ledger(file: Path | None) -> Mapping[str, Any]:
    """Return what the ledger says; where there is none, nothing."""
    try:
        told = json.loads(file.read_bytes()) if file else {}
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
