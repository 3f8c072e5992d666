"""`status`: how a server stands, and each of its models."""

from __future__ import annotations

import os
from pathlib import Path

import click

from gora_serve.cli.options import FILE, json_option
from gora_serve.config import ServeConfig


@click.command(short_help="Ask a server how it stands, and each of its models.")
@click.argument("url", default=f"http://{ServeConfig.host}:{ServeConfig.port}", metavar="[URL]")
@click.option(
    "--api-key-file",
    "--key-file",
    "key_file",
    type=FILE,
    help="Its first key is the one to ask with. Otherwise that of VLLM_API_KEY.",
)
@json_option
def status(url: str, key_file: Path | None, as_json: bool) -> int:
    """Ask a server of gora-serve how it stands: ready or not, and for each model requests, tokens and latency.

    URL is http://127.0.0.1:8000 where none is given. Exit status: 0 ready; 1 not ready, degraded or stopping;
    5 nobody answers.

    Latencies are estimated from histograms, over all answers since the start.
    """
    from gora_serve.cli.render import answer
    from gora_serve.cli.render_status import not_ready, status_summary
    from gora_serve.serving.keys import read_keys
    from gora_serve.serving.status import read_status, server_address

    address = server_address(url)
    keys = read_keys({} if key_file else os.environ, key_file)
    found = read_status(address, keys[0] if keys else None)
    return answer(status_summary(found), not_ready(found), as_json=as_json)
