"""Locks: who looks at one holds nobody up."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from gora_serve.integrity.locks import is_locked, locked


def test_who_writes_waits_for_who_only_looks(tmp_path: Path) -> None:
    target, file = tmp_path / "run", tmp_path / ".run.lock"
    file.write_text("4242\n")  # of a dead process
    assert not is_locked(target)
    looking = os.open(file, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.03, os.close, [looking]).start()
    with locked(target):
        assert is_locked(target)
    assert not is_locked(target)
    assert not file.exists()
