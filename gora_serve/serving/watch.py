"""What the guard in the engine is told: that the server is ready, and that a file changed that it was verified with.

The base must not change under a server. What the engine holds in memory stays as it was; but after a restart, on
another machine that shares the folder, or where it reads again, it would be something else. So a change is logged
loudly, and the guard answers /health with 503.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from gora_serve.errors import MismatchError
from gora_serve.integrity.reading import check_unchanged
from gora_serve.serving.guard import STATE_FILE, TOKEN
from gora_serve.serving.ledger import LEDGER, Ledger

EVERY = 3600.0  # seconds

log = logging.getLogger(__name__)


class FileWatch:
    """Compares size, times and inode of files with their stamps, now and then, and tells the guard of a change."""

    def __init__(self, stamps: Mapping[Path, tuple[int, ...]], *, every: float = EVERY) -> None:
        self._stamps = stamps
        self._every = every
        self._next = float("inf")
        self._folder = Path(tempfile.mkdtemp(prefix="gora-serve-"))
        self._state: dict[str, object] = {}
        self._lock = threading.Lock()
        self.degraded: str | None = None
        self.token = secrets.token_urlsafe(32)
        self.ledger = Ledger(self._folder / "ledger.json")

    @property
    def environment(self) -> dict[str, str]:
        """What the guard has to know."""
        return {STATE_FILE: str(self._folder / "state.json"), TOKEN: self.token, LEDGER: str(self.ledger.file)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def started(self) -> None:
        """Say that the server is ready for others, and begin to count the time."""
        self.ledger.ready()
        self.tell(ready=True)
        self._again()

    def _again(self) -> None:
        self._next = time.monotonic() + self._every

    def look(self) -> None:
        """Compare, if it is time to. A change is told once, and stays: only a new start verifies the files again.

        Where the files cannot be looked at, or the guard not told, that is logged and tried again next time. What a
        cleaner of temporary files has taken is written anew.
        """
        if time.monotonic() < self._next:
            return
        self._again()
        try:
            if self.degraded is None:
                check_unchanged(self._stamps)
            if not (self._folder / "state.json").exists():
                self.tell()
            if not self.ledger.file.exists():
                self.ledger.write()
        except MismatchError as err:
            self._degrade(f"a verified file changed: {err.fields['file']}")
        except OSError as err:  # of a network's file system, say
            log.error("the verified files cannot be looked at: %s", err, extra={"event": "unwatched"})

    def _degrade(self, why: str) -> None:
        what = "DEGRADED: %s. The engine serves what it has in memory; restart it to verify anew"
        log.error(what, why, extra={"event": "degraded"})
        try:
            self.tell(degraded=why)
            self.degraded = why
        except OSError as err:
            log.error("/health does not say so: %s", err, extra={"event": "unwatched"})

    def tell(self, **more: object) -> None:
        """Add to what the guard is told, or replace it by name. Threads may call this."""
        with self._lock:
            self._state |= more
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if self._folder.lstat().st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "another user has made this folder anew", str(self._folder))
            temporary = self._folder / "state.tmp"
            temporary.write_text(json.dumps(self._state), encoding="utf-8")
            temporary.replace(self._folder / "state.json")
