"""`serve`: verified adapters over one base, in a vLLM child process."""

from __future__ import annotations

import json
from typing import Any

import click

from gora_serve.cli.options import FILE
from gora_serve.config import ServeConfig


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("base")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    help="An adapter and the name it is served by. DIR may be a hub id with its revision.",
)
@click.option("--host", default=ServeConfig.host, show_default=True, help="Elsewhere than loopback needs VLLM_API_KEY.")
@click.option("--port", default=ServeConfig.port, show_default=True)
@click.option(
    "--served-name", default=ServeConfig.served_name, help="The base's name.  [default: its folder's or id's]"
)
@click.option(
    "--dtype", default=ServeConfig.dtype, show_default=True, help="Of weights and activations, as vLLM has it."
)
@click.option("--max-model-len", type=int, default=ServeConfig.max_model_len, help="Longest request in tokens.")
@click.option("--kv-cache-gib", default=ServeConfig.kv_cache_gib, show_default=True, help="On CPU only.")
@click.option("--log", type=FILE, help="Write the engine's output here.  [default: standard error]")
@click.option("--strict", is_flag=True, help="Refuse what otherwise is a warning.")
@click.option("--dry-run", is_flag=True, help="Print command and environment of the engine, and stop.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
def serve(base: str, adapters: tuple[str, ...], vllm_options: tuple[str, ...], **options: Any) -> int:
    """Serve one base and many adapters through vLLM's OpenAI API, after verifying every adapter.

    Everything after -- goes to `vllm serve`. The first SIGINT or SIGTERM drains and stops; no process stays behind.

    \b
    gora-serve serve BASE -a sql=adapters/sql -a chat=adapters/chat -- --max-num-seqs 16
    """
    from gora_serve.cli.render import emit, plan_summary, say, watching
    from gora_serve.integrity.record import ASSERTED
    from gora_serve.serving.engine import Server, serve_forever
    from gora_serve.serving.plan import parse_adapter
    from gora_serve.serving.start import prepare

    config = ServeConfig(
        host=options["host"], port=options["port"], dtype=options["dtype"], max_model_len=options["max_model_len"],
        kv_cache_gib=options["kv_cache_gib"], served_name=options["served_name"],
    )  # fmt: skip
    named = [parse_adapter(text) for text in adapters]
    with watching() as listen:
        plan, warnings = prepare(base, named, config, vllm_options, strict=options["strict"], listen=listen)
    for warning in warnings:
        say(f"warning: {warning}")
    for adapter in plan.adapters:
        if adapter.claim == ASSERTED:
            who = "was asserted (gora-serve bind or convert), not recorded by the tool that made it"
            say(f"note: {adapter.name}: its base {who}")
    if options["dry_run"]:
        emit(plan_summary(plan, warnings), as_json=options["as_json"])
        return 0
    say("starting: " + json.dumps(plan.models))

    def announce(server: Server) -> None:
        say(f"ready: {server.url}/v1 serves {', '.join(server.models)}")

    return serve_forever(plan, log=options["log"], announce=announce)
