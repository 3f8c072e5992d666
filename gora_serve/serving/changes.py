"""What changed in a watched directory, and what is to be done about it. Pure: stamps and times in, names out.

A stamp is any value that differs once something in a folder was written. A folder is only acted on when it has stood
still, from one look to a later one, for as long as an upload may pause: half of an adapter is not a bad adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace

Stamp = Hashable
NEVER = float("inf")


@dataclass(frozen=True)
class Tracked:
    """One name: its stamp (None: gone), since when it stands so, the stamp that was last acted on, and when that is to
    be tried again although nothing changed."""

    stamp: Stamp | None
    since: float
    tried: Stamp | None = None
    again: float = NEVER


def noticed(known: Mapping[str, Tracked], seen: Mapping[str, Stamp], now: float) -> dict[str, Tracked]:
    """Return what is known after another look. Names that are gone stay, until `forgotten`."""
    after = {}
    for name in sorted({*known, *seen}):
        stamp, before = seen.get(name), known.get(name)
        if before is None:
            after[name] = Tracked(stamp, now)
        else:
            after[name] = before if before.stamp == stamp else replace(before, stamp=stamp, since=now, again=NEVER)
    return after


def tried(known: Mapping[str, Tracked], name: str, again: float = NEVER) -> dict[str, Tracked]:
    """Return what is known after a name was acted on, as it stood."""
    return {**known, name: replace(known[name], tried=known[name].stamp, again=again)}


def to_load(known: Mapping[str, Tracked], now: float, settle: float) -> list[str]:
    """Return the names that have stood still for `settle` seconds and were not acted on so, or are due again."""
    return [
        name
        for name, one in known.items()
        if one.stamp is not None and _still(one, now, settle) and (one.stamp != one.tried or now >= one.again)
    ]


def to_remove(known: Mapping[str, Tracked], served: Collection[str], now: float, settle: float) -> list[str]:
    """Return the served names that have been gone for `settle` seconds."""
    return [name for name, one in known.items() if one.stamp is None and name in served and _still(one, now, settle)]


def forgotten(known: Mapping[str, Tracked], served: Collection[str]) -> dict[str, Tracked]:
    """Return what is known without the names that are gone and not served."""
    return {name: one for name, one in known.items() if one.stamp is not None or name in served}


def _still(one: Tracked, now: float, settle: float) -> bool:
    return one.since < now and now - one.since >= settle
