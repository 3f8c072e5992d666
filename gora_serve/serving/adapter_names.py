"""The names that adapters are served by: safe everywhere, and each of one model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gora_serve.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Devices on Windows, with any ending: a folder of such a name cannot be copied there.
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
# Kinds of content: vLLM gives a chat request for the base, whose content has a part of a kind (up to its first "_"), to
# the adapter of that name, a "default multimodal LoRA", and no option turns that off.
CONTENTS = frozenset({
    "text", "image", "audio", "video", "input", "output", "file", "refusal", "thinking", "reasoning", "summary", "tool",
})  # fmt: skip


def parse_adapter(text: str) -> tuple[str, Path]:
    """Split "name=dir" of the command line."""
    name, equals, directory = text.partition("=")
    if not equals or not directory:
        raise UsageError("an adapter is given as NAME=DIR", code="GS-281", actual=text, hint="-a NAME=DIR")
    check_name(name)
    return name, Path(directory)


def check_name(name: str) -> None:
    """Raise UsageError unless the name is safe in URLs, JSON, metrics labels and file names."""
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name) or name in CONTENTS:
        raise UsageError(
            "not a usable adapter name", code="GS-281", actual=name[:80], hint="rename it: -a NAME=DIR",
            expected="letters, digits, '.', '_' and '-', at most 64, first a letter or digit; no device (CON), and no "
            "kind of content (text, image)",
        )  # fmt: skip


def check_names(names: Sequence[str], served: str) -> None:
    """Raise UsageError for an unusable name, and GS-282 for one that another adapter or the base, `served`, has."""
    for place, name in enumerate(names):
        check_name(name)
        if _same(name, (*names[:place], *names[place + 1 :])) is not None:
            what, hint = "two adapters have the same name, but for case", "rename one of them: -a NAME=DIR"
            raise UsageError(what, code="GS-282", actual=name, hint=hint)
        if _same(name, [served]) is not None:
            hint = "rename the adapter, or the base with --served-name"
            raise UsageError("an adapter has the name of the base", code="GS-282", actual=name, hint=hint)


def require_free(name: str, taken: Iterable[str]) -> None:
    """Raise UsageError (GS-282) for a name that another model has, or that differs from it in case alone."""
    same = _same(name, taken)
    if same is not None:
        what = "another model has this name" + (", but for case" if same != name else "")
        raise UsageError(what, code="GS-282", actual=same, hint="rename the folder")


def _same(name: str, others: Iterable[str]) -> str | None:
    """Return the first that is the same but for case: file systems and people take them for one."""
    return next((other for other in others if other.casefold() == name.casefold()), None)
