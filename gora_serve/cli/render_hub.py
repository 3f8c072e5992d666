"""What people see of the hub: where an adapter was pushed to, and how files compare with what the hub reports."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from gora_serve.cli.render import Summary
from gora_serve.errors import MismatchError, counted, printable
from gora_serve.integrity.against_hub import AgainstHub
from gora_serve.integrity.push import Pushed


def with_push(summary: Summary, pushed: Pushed) -> Summary:
    """An export's summary, and where it was pushed."""
    seen_by = "private" if pushed.private else "public"
    lines = [
        f"pushed to {pushed.repo} ({seen_by}): the hub has {counted(len(pushed.files), 'file')}, all as they are here",
        f"commit {pushed.commit}",
        pushed.url,
    ]
    if pushed.others:
        lines.append(f"warning: a download of this adapter brings other files along: {', '.join(pushed.others)}")
    return Summary({**summary.value, "pushed": pushed.to_json()}, [*summary.lines, *lines], summary.tables)


def against_hub_summary(compared: AgainstHub) -> Summary:
    """Every file in a table, those with faults first, and the commit."""
    table = Table("file", "state", "digest", "hub", "here")
    for file in compared.files:
        names = (file.path, file.state, file.algorithm, _short(file.expected), _short(file.actual))
        table.add_row(*(Text(printable(name)) for name in names))
    equal = sum(file.state == "equal" for file in compared.files)
    lines = [f"{compared.path} against {compared.repo} at commit {compared.commit}"]
    if compared.faults:
        lines.append(f"{counted(len(compared.faults), 'file is', 'files are')} not as the hub has them, {equal} are")
    else:
        lines.append(f"verified: {counted(equal, 'file here is', 'files here are')} as the hub has them")
    return Summary(compared.to_json(), lines, [table])


def _short(digest: str | None) -> str:
    """The first half of a SHA-256: enough to tell two apart, and a row stays on a line."""
    return digest[:20] if digest else "none"


def refusal(compared: AgainstHub) -> MismatchError:
    """The error that names the first file."""
    first = compared.faults[0]
    more = f" (and {len(compared.faults) - 1} more)" if len(compared.faults) > 1 else ""
    return MismatchError(
        f"a file {_FAULTS[first.state]}" + more, code="GS-125", file=compared.path / first.path,
        expected=first.expected, actual=first.actual, hint="download it again at this commit; remove what is extra",
    )  # fmt: skip


_FAULTS = {"differs": "is not as the hub has it", "missing": "is missing", "extra": "is not the hub's"}
