"""`doctor`: what is installed, what is known against it, and what this machine can do."""

from __future__ import annotations

import click

from gora_serve.cli.options import json_option


@click.command(short_help="Look at versions, advisories, this machine and the engine.")
@click.option(
    "--engine", is_flag=True, help="Also start vLLM, over a model of a few kilobytes. Takes a minute or more."
)
@click.option("--strict", is_flag=True, help="Exit status 5 where something is below a floor.")
@json_option
def doctor(engine: bool, strict: bool, as_json: bool) -> int:
    """Look at versions, published advisories, the machine, the engine and the current folder.

    The advisories are those that loading, training or serving a model can meet; a scanner of all packages (pip-audit)
    knows more. Exit status 0, or 5 with --strict where a version, memory, disk or a lock is below its floor.
    """
    from gora_serve.cli.render import emit, say
    from gora_serve.cli.render_doctor import doctor_summary
    from gora_serve.cli.watching import watching
    from gora_serve.doctor import examine
    from gora_serve.errors import MachineError

    with watching() as listen:
        report = examine(start_engine=engine, listen=listen)
    emit(doctor_summary(report), as_json=as_json)
    if not (strict and report.below):
        return 0
    subjects = ", ".join(one.subject for one in report.below)
    refusal = MachineError(
        "this machine is below a floor", code="GS-572", actual=subjects, hint="the report says what each of them needs"
    )
    for line in str(refusal).splitlines():
        say(line)
    return refusal.exit_code
