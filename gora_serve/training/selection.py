"""Choosing modules by path: names and regular expressions of `--targets`. No torch, so `plan` stays instant."""

from __future__ import annotations

import re
from collections.abc import Collection

from gora_serve.errors import UsageError

WORDS = ("all-linear", "attention")


def select(paths: Collection[str], targets: str) -> set[str]:
    """Return the paths that `targets` names: "all-linear", names such as "q_proj,v_proj", or a regex for whole paths.

    A name is the end of a path. Raises UsageError when nothing matches, naming what there is.
    """
    if targets == "all-linear":
        chosen = set(paths)
    elif re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", targets):
        chosen = _by_name(paths, [name.strip() for name in targets.split(",")])
    else:
        chosen = _by_pattern(paths, targets)
    if not chosen:
        raise no_target(paths, targets)
    return chosen


def _by_name(paths: Collection[str], names: list[str]) -> set[str]:
    chosen: set[str] = set()
    for name in names:
        found = {path for path in paths if path == name or path.endswith(f".{name}")}
        if not found and name in WORDS:
            raise no_target(paths, name).advising(f"the word {name} stands alone: --targets {name}; or name modules")
        if not found:
            raise no_target(paths, name)
        chosen |= found
    return chosen


def _by_pattern(paths: Collection[str], pattern: str) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise UsageError(
            "--targets is neither names nor a regular expression",
            code="GS-202",
            hint="quote the expression, and check its brackets",
            actual=f"{pattern}: {err}",
        ) from err
    return {path for path in paths if compiled.fullmatch(path)}


def no_target(paths: Collection[str], targets: str) -> UsageError:
    """Return the error for targets that match none of the paths, to be raised by the caller."""
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    return UsageError(
        "no module matches --targets", code="GS-203", expected=f"some of {', '.join(names)}", actual=targets,
        hint="--targets all-linear",
    )  # fmt: skip
