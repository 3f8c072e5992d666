"""Write docs/cli.md from the commands themselves: `python docs/make_cli.py`. A test tells when it is out of date."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.main import cli

WIDTH = 100
FILE = Path(__file__).parent / "cli.md"
HEAD = f"""\
# Command line

`--help` of every command at {WIDTH} columns, written by `python docs/make_cli.py`.

Results go to standard output, everything else to standard error; `--json` prints the result for machines. What the
exit statuses and GS codes mean is in [errors.md](errors.md). BASE is a model folder or a hub id, `org/name` or
`org/name@REVISION`; ADAPTER may be an id with its revision, too.
"""


def help_of(command: click.Command, name: str) -> str:
    """What `--help` prints on a terminal of WIDTH columns."""
    settings = {**command.context_settings, "terminal_width": WIDTH - 2}  # Click keeps two columns free
    settings.setdefault("help_option_names", cli.context_settings["help_option_names"])
    with click.Context(command, info_name=name, **settings) as context:
        lines = command.get_help(context).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def reference() -> str:
    """The whole file."""
    parts = [HEAD, f"```text\n{help_of(cli, 'gora-serve')}\n```\n"]
    for name, command in cli.commands.items():
        parts.append(f"## {name}\n\n```text\n{help_of(command, f'gora-serve {name}')}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
