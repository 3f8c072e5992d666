"""`serve`: verified adapters over one base, in a vLLM child process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gora_serve.cli.options import FILE, FOLDER
from gora_serve.config import ServeConfig

if TYPE_CHECKING:
    from gora_serve.cli.journals import Journal


@click.command(
    context_settings={"ignore_unknown_options": False},
    short_help="Serve one base and many adapters through vLLM, each verified.",
)
@click.argument("base")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=DIR",
    help="An adapter and the name it is served by. DIR may be a hub id with its revision.",
)
@click.option(
    "--adapters",
    "adapters_dir",
    type=FOLDER,
    default=ServeConfig.adapters_dir,
    metavar="DIR",
    help="Watch DIR: each folder in it is served by its name, as it comes, changes and goes.",
)
@click.option(
    "--max-adapters",
    type=click.IntRange(1),
    default=ServeConfig.max_adapters,
    show_default=True,
    help="With --adapters: room for so many at once, or as many as there are at the start.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(1, 512),
    default=ServeConfig.max_rank,
    show_default=True,
    help="With --adapters: room for this rank, or the largest at the start.",
)
@click.option("--host", default=ServeConfig.host, show_default=True, help="Elsewhere than loopback needs a key.")
@click.option("--port", default=ServeConfig.port, show_default=True)
@click.option(
    "--served-name", default=ServeConfig.served_name, help="The base's name.  [default: its folder's or id's]"
)
@click.option(
    "--dtype", default=ServeConfig.dtype, show_default=True, help="Of weights and activations, as vLLM has it."
)
@click.option("--max-model-len", type=int, default=ServeConfig.max_model_len, help="Longest request in tokens.")
@click.option("--kv-cache-gib", default=ServeConfig.kv_cache_gib, show_default=True, help="On CPU only.")
@click.option(
    "--plugin/--no-plugin",
    default=ServeConfig.plugin,
    help="gora-serve's LoRA layers in the engine, or vLLM's own.  [default: --plugin on CPU]",
)
@click.option(
    "--rank-headroom",
    type=click.IntRange(0, 512),
    default=ServeConfig.rank_headroom,
    help="With the plugin: up to which rank in any module later adapters fit.  [default: --max-rank with --adapters]",
)
@click.option(
    "--store",
    type=FOLDER,
    default=ServeConfig.store,
    help="Folder of the verified copies that are served.  [default: in the user's cache]",
)
@click.option(
    "--api-key-file",
    "key_file",
    type=FILE,
    default=ServeConfig.key_file,
    help="Keys of clients, one a line, in a file that only you can read. VLLM_API_KEY holds another one.",
)
@click.option(
    "--open-route",
    "open_routes",
    multiple=True,
    default=ServeConfig.open_routes,
    metavar="PATH",
    help="Answer /health, /ping, /metrics, /version or /load without a key. Repeatable.",
)
@click.option("--verify", is_flag=True, help="Before it is ready, compare every adapter with PEFT, on the CPU.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default=ServeConfig.log_format,
    show_default=True,
    help="json: our events and the engine's lines as JSON, one object a line.",
)
@click.option("--log-requests", is_flag=True, default=ServeConfig.log_requests, help="A line for each request.")
@click.option("--log", type=FILE, help="Write the engine's output here.  [default: standard error]")
@click.option("--strict", is_flag=True, help="Refuse what otherwise is a warning.")
@click.option("--dry-run", is_flag=True, help="Print command and environment of the engine, and stop.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
def serve(base: str, adapters: tuple[str, ...], vllm_options: tuple[str, ...], **options: Any) -> int:
    """Serve one base and many adapters through vLLM's OpenAI API, after verifying every adapter.

    All faults of all adapters are listed at once, before the engine starts. What is served are read-only copies in the
    store. It is ready when each adapter is listed, answers otherwise than the base, and as its fingerprint says.

    With --adapters DIR what lies in a directory is served too: an adapter that is dropped in is verified and checked as
    those of the start, a new version of one takes its place between two requests, and one that is taken out is
    unloaded. A bad one is told of, and changes nothing.

    Where there is a key, every route wants it: Authorization: Bearer KEY.

    Everything after -- goes to `vllm serve`. The first SIGINT or SIGTERM drains and stops; no process stays behind.

    \b
    gora-serve serve BASE -a sql=adapters/sql -a chat=adapters/chat -- --max-num-seqs 16
    gora-serve serve BASE --adapters live
    """
    from gora_serve.cli.journals import journal
    from gora_serve.integrity.hub import without_tokens
    from gora_serve.serving.adapter_names import parse_adapter

    config = ServeConfig(
        host=options["host"], port=options["port"], dtype=options["dtype"], max_model_len=options["max_model_len"],
        kv_cache_gib=options["kv_cache_gib"], served_name=options["served_name"], store=options["store"],
        key_file=options["key_file"], open_routes=options["open_routes"], log_format=options["log_format"],
        log_requests=options["log_requests"], adapters_dir=options["adapters_dir"],
        max_adapters=options["max_adapters"], max_rank=options["max_rank"], plugin=options["plugin"],
        rank_headroom=options["rank_headroom"],
    )  # fmt: skip
    named = [parse_adapter(text) for text in adapters]
    with journal(config, options["log"]) as told:
        return _serve(base, named, config, vllm_options, options, told)
    assert told.failed is not None, "nothing else ends the block"
    if options["as_json"]:
        click.echo(without_tokens(json.dumps(told.failed.to_json(), indent=2)))
    return told.failed.exit_code


def _serve(
    base: str,
    named: list[tuple[str, Path]],
    config: ServeConfig,
    vllm_options: tuple[str, ...],
    options: Mapping[str, Any],
    told: Journal,
) -> int:
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_serve import plan_summary
    from gora_serve.serving.engine import Server, serve_forever
    from gora_serve.serving.live import watch_directory
    from gora_serve.serving.process import open_log
    from gora_serve.serving.start import prepare

    if options["log"] and not options["dry_run"]:
        open_log(options["log"]).close()  # what cannot be written is told before the base is hashed
    with told.watching() as listen:
        plan, warnings = prepare(
            base, named, config, vllm_options, strict=options["strict"], dry=options["dry_run"], listen=listen
        )
    for warning in warnings:
        told.warn(warning)
    told.verified(plan.adapters)
    if options["dry_run"]:
        emit(plan_summary(plan, warnings), as_json=options["as_json"])
        return 0
    layers = f", LoRA layers: {plan.lora_layers}" if plan.serves_adapters else ""
    told.tell(
        "start",
        f"starting: {', '.join(plan.models)}{layers}",
        models=plan.models,
        base=plan.base,
        lora_layers=plan.lora_layers,
    )

    def proof(server: Server) -> Iterator[None]:
        for checked in server.checked[: len(plan.adapters)]:  # those of a directory were told as they came
            told.tell("canary", f"canary: {checked}", model=checked.name, distance=checked.distance)
        if options["verify"]:
            from gora_serve.parity import check_parity

            with told.watching() as listen:
                served = replace(plan, adapters=server.adapters, models=server.models)
                for compared in check_parity(served, token=server.token, listen=listen):
                    told.tell("verified against PEFT", f"verified: {compared}", model=compared.name)
                    yield

    def announce(server: Server) -> None:
        what = f"ready: {server.url}/v1 serves {', '.join(server.models)}"
        told.tell("ready", what, url=server.url, models=server.models)

    def stopping(seconds: float) -> None:
        told.tell("stopping", f"stopping: requests at work have {seconds:g} seconds", seconds=seconds)

    beside = watch_directory(plan, told.change) if plan.watched is not None else None
    code = serve_forever(
        plan, log=told.log, proof=proof, announce=announce, stopping=stopping, pump=told.pump(), beside=beside
    )
    told.stopped(code)
    return code
