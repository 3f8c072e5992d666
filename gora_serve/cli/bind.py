"""`bind`: say which base a third-party adapter belongs to."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.options import FOLDER, json_option, overwrite_option


@click.command(short_help="Copy another tool's adapter, bound to the base that you name.")
@click.argument("adapter", type=FOLDER)
@click.option("--base", required=True, help="The base that the adapter was trained on: a model folder or a hub id.")
@click.option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder of the bound copy.")
@overwrite_option
@json_option
def bind(adapter: Path, base: str, output: Path, overwrite: bool, as_json: bool) -> None:
    """Write a copy of another tool's LoRA adapter that is bound to a base, because you say so.

    From then on verify and serve hold it to that base, byte for byte, and say "asserted". The tensors are copied as
    they are. Refused are shapes that the base does not have, tensors that are no LoRA factors, and pickles.
    """
    from gora_serve.bind import bind as bind_adapter
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_adapters import bind_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter

    with watching() as listen:
        done = bind_adapter(locate_adapter(adapter), base, output, overwrite=overwrite, listen=listen)
    emit(bind_summary(done), as_json=as_json)
