"""`gora-serve`: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from gora_serve import __version__
from gora_serve.cli.adapters import export, hash_
from gora_serve.cli.bind import bind
from gora_serve.cli.convert import convert
from gora_serve.cli.demo import demo
from gora_serve.cli.doctor import doctor
from gora_serve.cli.fitting import fit, probe, ranks
from gora_serve.cli.gap import gap
from gora_serve.cli.inspect import inspect
from gora_serve.cli.merge import merge
from gora_serve.cli.plan import plan
from gora_serve.cli.report import report
from gora_serve.cli.serve import serve
from gora_serve.cli.status import status
from gora_serve.cli.verify import verify
from gora_serve.cli.watching import quiet_libraries
from gora_serve.errors import GoraError, MachineError, Stopped, UsageError
from gora_serve.integrity.hub import without_tokens
from gora_serve.signals import came, leaving_on_signals

BUG = 70


SECTIONS = {  # in the order of work
    "From data to an adapter": (fit, probe, ranks, plan, report),
    "Adapters and proof": (export, verify, hash_, bind, inspect),
    "Adapters of other tools": (convert, gap, merge),
    "Serving": (serve, status),
    "This machine": (doctor, demo),
}


class Sections(click.Group):
    """A group whose help lists the commands section by section."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{command.name:{width}}", command.get_short_help_str()) for command in commands])


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gora-serve")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """One untouched base model, many tasks: from training data to a verified multi-adapter server.

    gora-serve COMMAND --help tells all of a command; README.md and docs/ of the repository tell of the whole.
    """


for command in (command for commands in SECTIONS.values() for command in commands):
    cli.add_command(command)


def run() -> None:
    """Entry point: run the command line and exit with the documented code."""
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code. Only errors that nobody foresaw are bugs (70)."""
    ours = argv[: argv.index("--")] if "--" in argv else argv
    debug = "--debug" in ours
    argv = [word for word in ours if word != "--debug"] + argv[len(ours) :]  # it may stand anywhere
    quiet_libraries()
    with leaving_on_signals():
        return _answer(argv, as_json="--json" in ours, debug=debug)


def _answer(argv: list[str], *, as_json: bool, debug: bool) -> int:
    try:
        result = _run(argv)
        if number := came():
            return _interrupted(number)
        return result if isinstance(result, int) else 0
    except GoraError as err:
        if number := came():
            return _interrupted(number)
        with _nobody_may_listen():
            _report(_of_command(err, argv[0]), as_json=as_json, debug=debug)
        return err.exit_code
    except Stopped as err:
        if os.environ.get("RANK", "0") == "0":
            click.echo(str(err), err=True)
        return err.exit_code
    except click.ClickException as err:
        with _nobody_may_listen():
            err.show()
            if as_json:
                click.echo(without_tokens(json.dumps(_usage(err).to_json(), indent=2)))
        return err.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _interrupted(signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads what is still buffered
        number = came()
        return 128 + number if number else 0
    except Exception as err:  # the last line of defence: exit 70 says that this is our bug
        if number := came():
            return _interrupted(number)
        if debug:
            _show_traceback()
        click.echo(without_tokens(f"bug: {type(err).__name__}: {err}"), err=True)
        click.echo("  try: run again with --debug and report the traceback", err=True)
        return BUG


def _run(argv: list[str]) -> object:
    """Run the command. A name that no file can have is refused wherever it is first looked for."""
    try:
        return cli.main(argv, prog_name="gora-serve", standalone_mode=False)
    except (OSError, RuntimeError) as err:
        if isinstance(err, RuntimeError) and "Symlink loop" in str(err):  # what pathlib raises before Python 3.13
            why, file = os.strerror(errno.ELOOP), str(err).partition("'")[2].rstrip("'")
        elif isinstance(err, OSError) and err.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            why, file = str(err.strerror), err.filename
        else:
            raise
        what, hint = f"no file can be reached by this path: {why}", "give a shorter path, without links"
        raise MachineError(what, code="GS-508", file=file, hint=hint) from err


def _interrupted(number: int) -> int:
    click.echo("interrupted", err=True)
    return 128 + number


@contextmanager
def _nobody_may_listen() -> Iterator[None]:
    """The exit status is the answer, whether or not anybody reads the words."""
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _of_command(err: GoraError, command: str) -> GoraError:
    """Return the error with the command's name in its hint, where it speaks of COMMAND."""
    hint, anyone = str(err.fields.get("try")), "gora-serve COMMAND "
    return err.advising(hint.replace(anyone, f"gora-serve {command} ")) if anyone in hint else err


def _usage(err: click.ClickException) -> UsageError:
    """Return what click refused as an error of ours: its fields are those of all others."""
    context = getattr(err, "ctx", None)
    words = context.command_path if context else "gora-serve"
    return UsageError(err.format_message(), code="GS-200", hint=f"{words} --help says what it takes")


def _report(err: GoraError, *, as_json: bool, debug: bool) -> None:
    if debug:
        _show_traceback()
    click.echo(without_tokens(str(err)), err=True)
    if as_json:
        click.echo(without_tokens(json.dumps(err.to_json(), indent=2)))


def _show_traceback() -> None:
    """Print the exception at hand on standard error; what a hub server said may repeat the token that it was sent."""
    click.echo(without_tokens(traceback.format_exc()), err=True, nl=False)
