"""`plan`: the memory that `probe`, `fit` and serving will take, from headers and configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from gora_serve.cli.options import json_option
from gora_serve.config import DataConfig, ModelConfig, PlanConfig, RankConfig, ServeConfig


@click.command(short_help="Reckon the memory that fit or serving will take, before loading.")
@click.argument("base")
@click.option(
    "-a",
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Plan serving instead: what these adapters take in vLLM. Repeatable.",
)
@click.option(
    "--targets",
    default=ModelConfig.targets,
    show_default=True,
    metavar="all-linear|attention|NAMES|REGEX",
    help="As for fit; attention goes by names alone.",
)
@click.option(
    "--dtype",
    default=ModelConfig.dtype,
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Of the base's weights in memory; auto: as config.json says.",
)
@click.option(
    "--quantize",
    default=ModelConfig.quantize,
    show_default=True,
    type=click.Choice(["none", "nf4"]),
    help="nf4: linear layers in 4 bits; embeddings, head and norms stay as they are.",
)
@click.option(
    "--mixed-precision",
    default=PlanConfig.mixed_precision,
    show_default=True,
    type=click.Choice(["no", "bf16", "fp16"]),
    help="As for fit; no Accelerate configuration is read.",
)
@click.option("--max-length", default=DataConfig.max_length, show_default=True, help="Tokens of the longest row.")
@click.option("--batch-size", default=DataConfig.batch_size, show_default=True, help="Rows of a micro-batch.")
@click.option("--rank", default=RankConfig.rank, show_default=True, help="Reference rank: sets the adapter's size.")
@click.option("--rank-max", type=int, default=RankConfig.rank_max, show_default="4 * rank")
@click.option(
    "--processes", default=PlanConfig.processes, show_default=True, help="Devices that share the work, on one machine."
)
@click.option(
    "--sharded",
    is_flag=True,
    default=PlanConfig.sharded,
    help="The processes share the weights out (FSDP2); without it each has them all.",
)
@click.option(
    "--device",
    type=click.Choice(["gpu", "cpu"]),
    show_default="gpu where there is one",
    help="What computes. On a CPU everything lies in one memory.",
)
@click.option(
    "--memory",
    type=float,
    metavar="GIB",
    show_default="what is free on this machine",
    help="Memory of each device, to recommend settings for.",
)
@click.option(
    "--plugin/--no-plugin",
    default=ServeConfig.plugin,
    help="With -a: gora-serve's LoRA layers in the engine, or vLLM's own.  [default: --plugin on CPU]",
)
@json_option
def plan(base: str, **options: Any) -> None:
    """Reckon parameters and memory of probing and training before anything is loaded; with -a, of serving.

    Of adapters: MiB of a slot, how much of it each one fills, how many fit --memory, and which modules make the slots
    as large as they are; with the plugin on CPU, MiB of each one's own ranks. -a takes --dtype, --device, --memory and
    --plugin, which is as for serve.

    BASE is a model folder or a hub id, of which only the JSON files are fetched; without weights the shapes follow
    from config.json for Llama, Mistral, Qwen2 and Qwen3. docs/memory.md says what each part is.
    """
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_plan import memory_summary
    from gora_serve.integrity.bases import locate_settings
    from gora_serve.training.advice import advise, free_memory
    from gora_serve.training.memory import estimate
    from gora_serve.training.shapes import read_shapes

    memory = _given_memory(options["memory"])
    device = options["device"]
    if memory is None or device is None:
        found, free = free_memory(device)
        device, memory = device or found, free if memory is None else memory
    if options["adapters"]:
        return _plan_serving(base, options, "gpu" if device == "gpu" else "cpu", memory)
    config = PlanConfig(
        model=ModelConfig(options["targets"], options["dtype"], options["quantize"]),
        data=DataConfig(options["max_length"], batch_size=options["batch_size"]),
        ranks=RankConfig(options["rank"], rank_max=options["rank_max"]),
        processes=options["processes"], sharded=options["sharded"], device=device,
        mixed_precision=options["mixed_precision"],
    )  # fmt: skip
    located = locate_settings(base)
    planned = estimate(read_shapes(Path(located.path)), config)
    emit(memory_summary(base, planned, config, memory, advise(planned, memory)), as_json=options["as_json"])


def _plan_serving(base: str, options: dict[str, Any], device: Literal["gpu", "cpu"], memory: int) -> None:
    from gora_serve.capacity import capacity
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_slots import capacity_summary
    from gora_serve.integrity.bases import locate_adapter, locate_settings

    named = [_named(text) for text in options["adapters"]]
    located = [(name, locate_adapter(folder)) for name, folder in named]
    found = capacity(
        Path(locate_settings(base).path), located, device=device, dtype=options["dtype"], memory=memory,
        plugin=options["plugin"], given=Path(base),
    )  # fmt: skip
    emit(capacity_summary(base, found, memory), as_json=options["as_json"])


def _named(text: str) -> tuple[str, Path]:
    from gora_serve.serving.adapter_names import parse_adapter

    return parse_adapter(text) if "=" in text else (Path(text).name, Path(text))


def _given_memory(gib: float | None) -> int | None:
    from gora_serve.errors import UsageError

    if gib is None:
        return None
    if not 0 < gib < 1e6:
        raise UsageError(
            "--memory must be positive", code="GS-209", hint="give what the device has, in GiB", actual=gib
        )
    return int(gib * 2**30)
