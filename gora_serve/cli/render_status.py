"""What `status` prints: a line for the server, and two tables of its models that fit into 80 columns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.cli.render import Summary
from gora_serve.errors import MismatchError, printable

if TYPE_CHECKING:
    from gora_serve.serving.status import ServerStatus

_DIGITS = 12  # of a root


def status_summary(found: ServerStatus) -> Summary:
    """The server and its models; as JSON all that it says."""
    lines = [f"{found.state}: {found.url}" + (f": {found.reason}" if found.reason else "")]
    standing = found.told.get("refused")
    standing = standing if isinstance(standing, dict) else {}
    lines += [printable(f"  refused: {name}: {why}") for name, why in standing.items()]
    lines += [
        printable(f"  refused since the start: {name} ({count})")
        for name, count in _counts(found.told.get("failures")).items()
        if name not in standing or count > 1
    ]
    for name, counts in _objects(found.told.get("others")).items():
        every, failed = _requests(counts)
        lines.append(f"  requests for {name}: {every:,}" + (f", {failed:,} failed" if failed else ""))
    lines += [
        printable(f"  last error of {model.get('name')}: {error}")
        for model in found.models
        if (error := _last_error(model))
    ]
    return Summary(found.to_json(), lines, [_models(found), _traffic(found)] if found.models else [])


def not_ready(found: ServerStatus) -> MismatchError | None:
    """Return the answer no (GS-1470) of a server that is degraded, stopping, or not ready."""
    if found.state == "ready":
        return None
    hints = {"degraded": "see its log; a restart verifies everything anew", "stopping": "start it again"}
    hint = hints.get(found.state, "ask again in a while")
    return MismatchError(f"the server is {found.state}", code="GS-1470", actual=found.reason, hint=hint)


def _models(found: ServerStatus) -> Table:
    """What each model is, and where."""
    table = Table("model", "served", "root", "form", "rank", "resident")
    for model in found.models:
        root = str(model.get("root") or "-").rpartition(":")[2][:_DIGITS]
        cells = (
            model.get("name"), _age(model.get("since")), root, model.get("form") or "-", model.get("rank") or "-",
            model.get("resident") or "-",
        )  # fmt: skip
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _traffic(found: ServerStatus) -> Table:
    """What was asked of each model, and how long answers took."""
    table = Table("model")
    for name in ("requests", "failed", "tokens in", "out", "p50", "p95"):
        table.add_column(name, justify="right")
    for model in found.models:
        every, failed = _requests(model)
        cells = (
            model.get("name"), _number(every), _number(failed), _number(model.get("prompt_tokens")),
            _number(model.get("completion_tokens")), _seconds(model.get("p50")), _seconds(model.get("p95")),
        )  # fmt: skip
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _requests(counts: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many there were, and how many of them failed."""
    by_status = _counts(counts.get("requests"))
    failed = sum(count for status, count in by_status.items() if not status.startswith("2"))
    return sum(by_status.values()), failed


def _last_error(model: Mapping[str, Any]) -> str | None:
    if model.get("error"):
        return str(model["error"])
    when = model.get("last_server_error")
    return f"5xx, {_age(when)} ago" if isinstance(when, int | float) and when > 0 else None


def _age(since: object) -> str:
    if not isinstance(since, int | float):
        return "-"
    seconds = max(0, int(time.time() - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _seconds(value: object) -> str:
    return f"{value:.3g} s" if isinstance(value, int | float) else "-"


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{int(value):,}" if value < 1e6 else f"{value / 1e6:,.1f} M"


def _counts(value: object) -> dict[str, int]:
    return {str(name): one for name, one in value.items() if isinstance(one, int)} if isinstance(value, dict) else {}


def _objects(value: object) -> dict[str, dict[str, Any]]:
    return {str(name): one for name, one in value.items() if isinstance(one, dict)} if isinstance(value, dict) else {}
