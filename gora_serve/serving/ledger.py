"""What the server's parent knows of its models and the engine does not: written by the parent, read in the engine.

A small JSON file beside the one that says whether the server is ready. Whoever adds, replaces, refuses or removes an
adapter while the server runs says so here.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gora_serve.errors import GoraError, printable

if TYPE_CHECKING:
    from gora_serve.serving.served import ServedAdapter

LEDGER = "GORA_SERVE_LEDGER"
log = logging.getLogger(__name__)
_LONGEST = 500  # characters of an error


class Ledger:
    """The file, and what is in it. Times are seconds since 1970."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._began = time.time()
        self._told: dict[str, Any] = {"models": {}, "failures": {}, "refused": {}, "start_seconds": None}

    def serves(self, base: str, adapters: Sequence[ServedAdapter]) -> None:
        """Say what the server starts with."""
        now = time.time()
        models = {base: {"kind": "base", "since": now}} | {one.name: {**_entry(one), "since": now} for one in adapters}
        with self._changing() as told:
            told["models"] = models

    def ready(self) -> None:
        """Say that the server is ready: all that it serves, it serves from now on."""
        now = time.time()
        with self._changing() as told:
            told["models"] = {name: {**entry, "since": now} for name, entry in told["models"].items()}
            told["start_seconds"] = now - self._began

    def added(self, adapter: ServedAdapter, seconds: float) -> None:
        """Say that an adapter, or another version of one, is served now; loading it took so many seconds."""
        with self._changing() as told:
            told["models"][adapter.name] = {**_entry(adapter), "since": time.time(), "load_seconds": seconds}

    def removed(self, name: str) -> None:
        """Say that an adapter is no longer served."""
        with self._changing() as told:
            told["models"].pop(name, None)

    def refused(self, name: str, err: GoraError, *, older: bool) -> None:
        """Say that a folder of this name was refused, and whether an older version of it goes on being served."""
        with self._changing() as told:
            told["failures"][name] = told["failures"].get(name, 0) + 1
            why = printable(f"[{err.code}] {err.what}")[:_LONGEST]
            told["refused"] = {**told["refused"], name: why}
            if older:
                told["models"][name]["error"] = why

    def mended(self, name: str) -> None:
        """Say that nothing speaks against a name any more: what is there is served, or its folder is gone."""
        with self._changing() as told:
            told["refused"].pop(name, None)
            told["models"].get(name, {}).pop("error", None)

    def write(self) -> None:
        """Write the file as it was."""
        with self._changing():
            pass

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Yield what is told, to be changed; then write it. One thread at a time."""
        with self._lock:
            yield self._told
            try:
                temporary = self.file.with_suffix(".new")
                temporary.write_text(json.dumps(self._told), encoding="utf-8")
                temporary.replace(self.file)
            except OSError as err:  # serving goes on, and the next change writes all of it
                log.warning("what `status` and /metrics tell is not up to date: %s", err)


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
