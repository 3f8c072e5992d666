"""The keys that clients must have: out of the environment or a file, never from a command line, never printed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from gora_serve.errors import MachineError, UsageError

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own
KEY_FILE = "GORA_SERVE_API_KEY_FILE"
SHORTEST = 16  # characters
_LIMIT = 64 << 10  # bytes


def read_keys(environ: Mapping[str, str], file: Path | None) -> tuple[str, ...]:
    """Return the keys: VLLM_API_KEY's, then those of `file`, one a line; () where there are none.

    Raises UsageError (GS-289) for a file without a usable key, MachineError for one that cannot be read (GS-5353) or
    that others can read (GS-5354). No message has a key in it.
    """
    own = environ.get(KEY_VARIABLE)
    return (*((own,) if own else ()), *(_keys_in(file) if file is not None else ()))


def _keys_in(file: Path) -> tuple[str, ...]:
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            text = stream.read(_LIMIT).decode("ascii", "replace")
    except OSError as err:
        raise MachineError(
            f"the file with the keys cannot be read: {err.strerror}", code="GS-5353", file=file, hint="check the path"
        ) from err
    if mode & 0o077:
        raise MachineError(
            "others can read the file with the keys", code="GS-5354", file=file, expected="mode 600",
            actual=f"mode {mode:o}", hint="chmod 600",
        )  # fmt: skip
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys or any(len(key) < SHORTEST or not key.isprintable() or not key.isascii() or " " in key for key in keys):
        raise UsageError(
            "the file holds no usable key", code="GS-289", file=file,
            expected=f"one key a line, of {SHORTEST} characters or more, without spaces",
            hint="python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
        )  # fmt: skip
    return keys
