"""What `doctor` prints: one table, a section for each subject, the state of each line in words and color."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from gora_serve.cli.render import Summary
from gora_serve.errors import printable

if TYPE_CHECKING:
    from gora_serve.doctor import Report

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "below": "bold red"}


def doctor_summary(report: Report) -> Summary:
    """The report; as JSON every finding by section, and the subjects that are below a floor."""
    table = Table("what", "found", "state", "note")
    for name, findings in report.sections.items():
        table.add_row(Text(name, style="bold"), "", "", "")
        for index, one in enumerate(findings):
            cells = [Text(f"  {printable(one.subject)}"), Text(printable(one.found))]
            state, note = Text(one.state, style=STYLES[one.state]), Text(printable(one.note))
            table.add_row(*cells, state, note, end_section=index + 1 == len(findings))
    count = len(report.below)
    line = (
        f"{count} below a floor: {', '.join(one.subject for one in report.below)}" if count else "all as it should be"
    )
    return Summary(report.to_json(), [line], [table])
