"""`convert`: an adapter of another tool becomes plain LoRA on the untouched base."""

from __future__ import annotations

from pathlib import Path

import click

from gora_serve.cli.options import FOLDER, json_option, keep_options, overwrite_option, source_options
from gora_serve.config import ConvertConfig, ExportDtype, Form


@click.command(short_help="Rewrite another tool's adapter as plain LoRA on the untouched base.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The untouched base: a model folder or a hub id.")
@click.option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder of the converted adapter.")
@source_options
@click.option(
    "--rank",
    type=int,
    default=ConvertConfig.rank,
    metavar="R",
    show_default="as many as the update has",
    help="Keep the largest singular values over all modules, within the parameters of LoRA at this rank.",
)
@click.option(
    "--tolerance",
    type=float,
    default=ConvertConfig.tolerance,
    metavar="T",
    help="Instead of --rank: drop the smallest ones, up to this share of the update's norm.",
)
@click.option(
    "--form",
    default=ConvertConfig.form,
    show_default=True,
    type=click.Choice(["unit", "padded", "native"]),
    help="As for export.",
)
@click.option(
    "--dtype", default=ConvertConfig.dtype, show_default=True, type=click.Choice(["float32", "bfloat16", "float16"])
)
@keep_options
@overwrite_option
@json_option
def convert(
    adapter: Path,
    base: str,
    output: Path,
    family: str,
    init_adapter: Path | None,
    mutated_base: Path | None,
    cache: Path | None,
    allow_pickle: bool,
    rank: int | None,
    tolerance: float | None,
    form: Form,
    dtype: ExportDtype,
    leave_out: tuple[str, ...],
    carry: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write an adapter of another tool as plain LoRA on the untouched base.

    ADAPTER is a folder, a file, or a hub id with its revision (ORG/NAME@REV): PEFT's LoRA and its relatives, PiSSA,
    OLoRA, CorDA, LoRA-GA, LoftQ, DoRA, LoHa, LoKr, VeRA and others, adapters of mlx-lm, torchtune, kohya and
    MyTransformers, or a whole fine-tuned model. What the family is, is read from the files, and said. The update is
    compressed in float64 to its numerical rank, rounded once and compared with the exact one; conversion.json tells
    what was done with each tensor.
    """
    from converters.convert import convert as convert_adapter
    from converters.reading import Inputs
    from gora_serve.cli.render import emit, say
    from gora_serve.cli.render_convert import convert_summary
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.reading import naming_inputs

    config = ConvertConfig(family, rank, tolerance, form, dtype)
    config.validate()
    with watching() as listen, naming_inputs():
        inputs = Inputs(None, init_adapter, mutated_base, cache, allow_pickle, listen, leave_out, carry)
        folder, located = locate_adapter(adapter), locate_base(base)
        done = convert_adapter(folder, located, output, config, inputs, overwrite=overwrite)
    for warning in done.warnings:
        say(f"warning: {warning}")
    emit(convert_summary(done), as_json=as_json)
