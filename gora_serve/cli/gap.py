"""`gap`: what an adapter of another tool would cost if it were served as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from gora_serve.cli.options import FILE, data_options, json_option, keep_options, overwrite_option, source_options
from gora_serve.config import DataConfig, ExportDtype, GapConfig, TrainedOn

if TYPE_CHECKING:
    from converters.reading import Inputs


@click.command(short_help="Measure what serving another tool's adapter as it is would cost.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The untouched base: a model folder or a hub id.")
@source_options
@keep_options
@click.option(
    "--threshold",
    default=GapConfig.threshold,
    show_default=True,
    metavar="X",
    help="Largest error, as a share of the update, at which the adapter may be served as it is (exit status 0).",
)
@click.option(
    "--dtype",
    default=GapConfig.dtype,
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the stored factors; engines cast them to the model's.",
)
@click.option(
    "--trained-on",
    default=GapConfig.trained_on,
    show_default=True,
    type=click.Choice(get_args(TrainedOn)),
    help="What the base's weights lay in during training. auto: asks the adapter, else stored, as in their files.",
)
@click.option("--tasks", default=GapConfig.tasks, show_default=True, help="Number of tasks in the cost of deployment.")
@click.option(
    "--data",
    metavar="FILE|DATASET",
    help="Also ask the models: as trained, served unconverted, converted, and the base. Rows as for fit.",
)
@click.option("--max-rows", default=GapConfig.max_rows, show_default=True, help="Most rows of --data.")
@data_options
@click.option("--plot", type=FILE, help="Write the picture: PNG, SVG or PDF.")
@overwrite_option
@json_option
def gap(
    adapter: Path,
    base: str,
    family: str,
    init_adapter: Path | None,
    mutated_base: Path | None,
    cache: Path | None,
    allow_pickle: bool,
    leave_out: tuple[str, ...],
    carry: tuple[str, ...],
    threshold: float,
    dtype: ExportDtype,
    trained_on: TrainedOn,
    tasks: int,
    data: str | None,
    max_rows: int,
    max_length: int,
    chat_template: bool,
    batch_size: int,
    columns: str | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Measure what serving an adapter as it is would cost, on the untouched base.

    Per module and in total: the error of the adapter unconverted; the rounding of an edited base, which no adapter can
    hold; the error of storing the update, converted and not compressed; and what N tasks take to deploy.

    Exit status: 0 the adapter may be served as it is; 1 it is off by more than --threshold, or no engine loads it.
    """
    from converters.gap import find_gap
    from converters.reading import Inputs
    from gora_serve.cli.render import answer, say
    from gora_serve.cli.render_gap import gap_summary, refusal
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.reading import naming_inputs

    config = GapConfig(family, dtype, threshold, trained_on, tasks, max_rows)
    config.validate()
    rows = DataConfig(max_length, chat_template, batch_size, columns)
    rows.validate()
    if plot:
        from gora_serve.pictures import check_picture

        check_picture(plot, overwrite=overwrite)
    with watching() as listen, naming_inputs():
        inputs = Inputs(None, init_adapter, mutated_base, cache, allow_pickle, listen, leave_out, carry)
        located = locate_base(base)
        report = find_gap(locate_adapter(adapter), located, config, inputs, data=data, rows=rows)
    report = replace(report, adapter=str(adapter))  # as it was given: a hub id, not its folder
    if plot:
        from gora_serve.pictures import plot_gap

        plot_gap(report.gap, plot, dtype=dtype, title=f"{adapter.name} ({report.detection.family}) on {located.name}")
    for warning in report.warnings:
        say(f"warning: {warning}")
    refused = None if report.gap.within(threshold) else refusal(report, _sources(inputs), _kept(inputs))
    return answer(gap_summary(report, plot), refused, as_json=as_json)


def _sources(inputs: Inputs) -> list[str]:
    """Return the options that other commands need too, to read the adapter."""
    given = {"--init-adapter": inputs.init_adapter, "--mutated-base": inputs.mutated_base, "--cache": inputs.cache}
    words = [word for option, path in given.items() if path is not None for word in (option, str(path))]
    return words + (["--allow-pickle"] if inputs.pickles else [])


def _kept(inputs: Inputs) -> list[str]:
    """Return the options that `convert` needs too, to drop or keep tensors."""
    words = [word for name in inputs.leave_out for word in ("--leave-out", name)]
    return words + [word for name in inputs.carry for word in ("--carry", name)]
