"""How long work tells its caller where it stands: one frozen event, passed to a callable. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step of a stage: `done` of `total` units, with the numbers worth showing (loss, tokens/s ...).

    in_bytes: the units are bytes.
    """

    stage: str
    done: int
    total: int
    fields: Mapping[str, float] = field(default_factory=dict)
    in_bytes: bool = False


Listener = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore every event: the default listener."""
