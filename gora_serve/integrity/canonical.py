"""JSON in the two forms this room needs: one canonical spelling to hash, and one bounded, strict reader for files.

The reader takes less than Python's `json`: no duplicate keys, no NaN, no byte order mark, limits on size and depth.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from gora_serve.errors import InputError
from gora_serve.integrity.reading import open_regular, read_range, size_of

MIB = 1 << 20
MAX_DEPTH = 64
MAX_INTEGER = 2**53 - 1  # RFC 8785 numbers are IEEE doubles: above this, two integers share one spelling
HINT = "use strings, and whole numbers below 2**53"


class StrictJsonError(ValueError):
    """JSON that Python would take and we do not; `duplicate` is the repeated key where that is the reason."""

    def __init__(self, message: str, *, duplicate: str | None = None) -> None:
        super().__init__(message)
        self.duplicate = duplicate


def canonical_json(value: object) -> bytes:
    """Return the RFC 8785 spelling of `value` in UTF-8: no blanks, keys in the order of their UTF-16 code units.

    Takes strings, integers within 2**53 - 1, booleans, None, lists and mappings with string keys. Raises InputError
    (GS-321) for anything else, floats included: what we hash has no need of them.
    """
    return json.dumps(_ordered(value), ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _ordered(value: object) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked_text(value)
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise InputError(
                f"the integer {value} has no canonical form", code="GS-321", hint=HINT, expected="at most 2**53 - 1"
            )
        return value
    if isinstance(value, (list, tuple)):
        return [_ordered(item) for item in value]
    if isinstance(value, Mapping):
        names = [_checked_text(name) for name in value]
        return {name: _ordered(value[name]) for name in sorted(names, key=lambda name: name.encode("utf-16-be"))}
    raise InputError(f"a {type(value).__name__} has no canonical JSON form", code="GS-321", hint=HINT)


def _checked_text(text: object) -> str:
    if not isinstance(text, str) or not is_unicode(text):
        raise InputError("a key or string has no canonical JSON form", code="GS-321", hint=HINT, actual=repr(text))
    return text


def is_unicode(text: str) -> bool:
    """Return whether `text` can be written as UTF-8 (a lone surrogate cannot)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return `pairs` as a dict, as `object_pairs_hook` of `json.loads`; a repeated key raises StrictJsonError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise StrictJsonError(f"the key {twice!r} occurs twice", duplicate=twice)
    return result


def refuse_constant(text: str) -> NoReturn:
    """Refuse NaN and Infinity, as `parse_constant` of `json.loads`."""
    raise StrictJsonError(f"{text} is not JSON")


def read_json(path: Path, *, limit: int = 10 * MIB) -> object:
    """Return the value in the JSON file at `path`, of at most `limit` bytes and 64 levels.

    Raises MachineError (GS-501, GS-502) when the file cannot be read, InputError (GS-309, GS-318 to GS-320) when it is
    too large, not strict JSON in UTF-8, or nested too deeply.
    """
    with open_regular(path) as fd:
        size = size_of(fd)
        if size > limit:
            raise InputError(
                "this JSON file is too large", code="GS-318", file=path,
                expected=f"at most {limit} bytes", actual=f"{size} bytes",
                hint="is this the right file? fetch it again",
            )  # fmt: skip
        raw = read_range(fd, 0, size, path=path)
    return parse_json(raw, path)


def parse_json(raw: bytes, path: Path) -> object:
    """Return the value in `raw`, strict JSON of at most 64 levels; `path` is for messages. Raises as `read_json`."""
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique_pairs, parse_constant=refuse_constant, parse_float=_finite,
        )  # fmt: skip
        too_deep = _deeper_than(value, MAX_DEPTH)
    except RecursionError:
        too_deep = True
    except StrictJsonError as err:
        code = "GS-309" if err.duplicate is not None else "GS-319"
        hint = "correct the file, or fetch it again"
        raise InputError(f"this file is not strict JSON: {err}", code=code, file=path, hint=hint) from err
    except ValueError as err:  # also UnicodeDecodeError, JSONDecodeError and integers of thousands of digits
        hint = "the file may be cut off or damaged; fetch it again"
        if raw.startswith(b"\xef\xbb\xbf"):
            hint = "save it as UTF-8 without a byte order mark"
        raise InputError(f"this file is not JSON: {err}", code="GS-319", file=path, hint=hint) from err
    if too_deep:
        raise InputError(
            "this JSON file is nested too deeply", code="GS-320", file=path, expected=f"{MAX_DEPTH} levels",
            hint="is this the right file? fetch it again",
        )  # fmt: skip
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise StrictJsonError(f"the number {text} is beyond a double")
    return number


def _deeper_than(value: object, levels: int) -> bool:
    """Return whether `value` nests deeper than `levels`; a lone surrogate on the way raises StrictJsonError."""
    if isinstance(value, str) and not is_unicode(value):
        raise StrictJsonError("a string holds half of a surrogate pair")
    if isinstance(value, dict):
        inner = [*value, *value.values()]
    elif isinstance(value, list):
        inner = value
    else:
        return False
    return levels == 0 or any(_deeper_than(item, levels - 1) for item in inner)
