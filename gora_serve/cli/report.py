"""`report`: runs of `fit`, side by side on one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.options import FILE, FOLDER, json_option, overwrite_option
from gora_serve.config import ReportConfig
from gora_serve.errors import counted


@click.command(short_help="Write one HTML page about runs: losses, ranks, cost, proof.")
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN...")
@click.option(
    "--output",
    default=ReportConfig.output,
    show_default=True,
    type=FILE,
    metavar="FILE.html",
    help="The page to write.",
)
@click.option("--gap", "gaps", multiple=True, type=FILE, metavar="GAP.json",
              help="Also show what gap --json printed; may be given several times.")  # fmt: skip
@overwrite_option
@json_option
def report(runs: tuple[Path, ...], output: Path, gaps: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Write one HTML page about runs of fit: losses, ranks, updates, gamma, parameters, time, base, commands.

    The page is one file without scripts, and asks for nothing from outside of itself. RUN may be unfinished or have
    failed (RUN.partial); then the page shows what is there. The same runs give the same bytes.
    """
    from gora_serve.cli.render import Summary, emit
    from gora_serve.report.page import write_report

    read = write_report(runs, output, gaps=gaps, overwrite=overwrite)
    value = {"report": str(output), "runs": [{"run": str(run.folder), "status": run.status} for run in read]}
    emit(Summary(value, [f"wrote {output}: {counted(len(read), 'run')}"]), as_json=as_json)
