"""`inspect`: what lies in a folder, without reading a tensor."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.options import FOLDER, json_option


@click.command(short_help="Say what a folder is: adapter, run, probe, base or merged model.")
@click.argument("path", type=FOLDER)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what an adapter, a run, a probe, a base or a merged model is: ranks, scales, sizes, its base.

    Of an adapter also how much of a slot it fills in vLLM, which pads every module to one rank. Headers and JSON files
    are read, and nothing is hashed: what the files say of themselves is proved by verify.
    """
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_inspect import inspect_summary
    from gora_serve.inspect import inspect as inspect_path

    emit(inspect_summary(inspect_path(path)), as_json=as_json)
