"""The keys that clients must have: out of the environment or a file, never from a command line, never printed."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from gora_serve.errors import MachineError, UsageError

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own
KEY_FILE = "GORA_SERVE_API_KEY_FILE"
# VLLM_API_KEY as the guard gets it beside a file: vLLM would let in nobody else under /v1.
INNER_KEY = "GORA_SERVE_API_KEY"
SHORTEST = 16  # characters
_LIMIT = 64 << 10  # bytes
_NEW_KEY = """python -c 'import secrets; print(secrets.token_urlsafe(32), end="")' makes one"""


def read_keys(environ: Mapping[str, str], file: Path | None) -> tuple[str, ...]:
    """Return the keys: VLLM_API_KEY's, then those of `file`, one a line; () where there are none.

    Raises UsageError (GS-289) for a key that is too short or has spaces, and for a file without one, MachineError for
    a file that cannot be read (GS-5353) or that others can read (GS-5354). No message has a key in it.
    """
    own = environ.get(KEY_VARIABLE)
    if own and not _usable(own):
        raise UsageError(
            f"{KEY_VARIABLE} is no usable key", code="GS-289",
            expected=f"{SHORTEST} characters or more, without spaces and line ends", hint=_NEW_KEY,
        )  # fmt: skip
    return (*((own,) if own else ()), *(_keys_in(file) if file is not None else ()))


def _usable(key: str) -> bool:
    return len(key) >= SHORTEST and key.isprintable() and key.isascii() and " " not in key


def inner(environment: Mapping[str, str], file: Path | None) -> dict[str, str]:
    """Return the engine's environment with all keys for the guard: vLLM's own check knows those of no file."""
    found = {name: value for name, value in environment.items() if name not in (INNER_KEY, KEY_FILE)}
    if file is not None and KEY_VARIABLE in found:
        found[INNER_KEY] = found.pop(KEY_VARIABLE)
    return found


def _keys_in(file: Path) -> tuple[str, ...]:
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            text = stream.read(_LIMIT + 1).decode("ascii", "replace")
    except OSError as err:
        raise MachineError(
            f"the file with the keys cannot be read: {err.strerror}", code="GS-5353", file=file, hint="check the path"
        ) from err
    if mode & 0o077:
        raise MachineError(
            "others can read the file with the keys", code="GS-5354", file=file, expected="mode 600",
            actual=f"mode {mode:o}", hint="chmod 600",
        )  # fmt: skip
    if len(text) > _LIMIT:  # the rest would be left out, and what is cut off be a key
        raise UsageError(
            "the file with the keys is too long", code="GS-289", file=file, expected=f"at most {_LIMIT} bytes",
            hint="one key a line, and nothing else",
        )  # fmt: skip
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys or not all(map(_usable, keys)):
        raise UsageError(
            "the file holds no usable key", code="GS-289", file=file,
            expected=f"one key a line, of {SHORTEST} characters or more, without spaces",
            hint=_NEW_KEY,
        )  # fmt: skip
    return keys
