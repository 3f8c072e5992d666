"""`gap`: what an adapter of another tool would cost if it were served as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import click

from gora_serve.cli.options import FILE, data_options, json_option, source_options
from gora_serve.config import DataConfig, ExportDtype, GapConfig, TrainedOn


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The untouched base: a model folder or a hub id.")
@source_options
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
@json_option
def gap(
    adapter: Path,
    base: str,
    family: str,
    init_adapter: Path | None,
    mutated_base: Path | None,
    cache: Path | None,
    allow_pickle: bool,
    threshold: float,
    dtype: ExportDtype,
    trained_on: TrainedOn,
    tasks: int,
    data: str | None,
    max_rows: int,
    max_length: int,
    chat_template: bool,
    batch_size: int,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Measure what serving an adapter as it is would cost, on the untouched base.

    Per module and in total: the error of the adapter unconverted; the rounding of an edited base, which no adapter can
    hold; the error of storing the update, converted and concatenated; and what N tasks take to deploy.

    Exit status: 0 the adapter may be served as it is; 1 it is off by more than --threshold, or no engine loads it.
    """
    from converters.read import held_to_base, read
    from converters.reading import Inputs
    from gora_serve.adapter.linalg import NUMERICAL
    from gora_serve.cli.render import emit, say, watching
    from gora_serve.cli.render_gap import GapReport, gap_summary, refusal
    from gora_serve.deploy.base import BaseWeights
    from gora_serve.deploy.cost import deployments
    from gora_serve.deploy.gap import STORED, Parts, measure_gap
    from gora_serve.deploy.trained_on import quantization
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.manifest import hash_model
    from gora_serve.integrity.reading import naming_inputs
    from gora_serve.training.lengths import check_length, positions

    config = GapConfig(family, dtype, threshold, trained_on, tasks, max_rows)
    config.validate()
    rows = DataConfig(max_length, chat_template, batch_size)
    rows.validate()
    if plot:
        from gora_serve.report import check_picture

        check_picture(plot)
    with watching() as listen, naming_inputs():
        located = locate_base(base)
        weights = BaseWeights(located.path)
        if data is not None:
            check_length(positions(weights.config), rows)
        inputs = Inputs(weights, init_adapter, mutated_base, cache, allow_pickle, listen)
        source, detection, reading = read(locate_adapter(adapter), inputs, family)
        warnings = held_to_base(source, lambda: hash_model(located.path, listen=listen), located.path, inputs)
        lay_in = quantization(source.tensors.metadata, reading.adapter.base.name, source.weights)
        if trained_on != "auto":
            lay_in = None if trained_on == "stored" else (trained_on, "--trained-on says so")
        parts = Parts(
            weights, reading.adapter.modules, reading.served, reading.initial, reading.edited, _rounder(lay_in),
            STORED.get(lay_in[0]) if lay_in else None, reading.full_rank, source.weights,
        )  # fmt: skip
        stored, tolerance = STORED[dtype], NUMERICAL[dtype]
        measured = measure_gap(parts, stored, tolerance=tolerance, listen=listen)
        comparison = None
        if data is not None:
            from gora_serve.training.compare import compare, variants_of

            variants = variants_of(parts, reading.adapter.carried, stored, tolerance)
            comparison = compare(located, data, parts, variants, rows=rows, max_rows=max_rows, listen=listen)
    base_bytes = sum(entry.nbytes for entry in weights.tensors.entries.values())
    sizes = [math.prod(source.tensors.shape(name)) for name in reading.applied]
    trained = 0 if reading.full_rank else sum(sizes)
    costs = deployments(measured.modules, trained=trained, base_bytes=base_bytes, itemsize=stored.itemsize, tasks=tasks)
    report = GapReport(
        str(adapter), located.name, detection.family, detection.evidence, reading.method, reading.notes,
        reading.full_rank, config, lay_in, measured, costs, comparison, plot, warnings,
    )  # fmt: skip
    if plot:
        from gora_serve.report import plot_gap

        plot_gap(measured, plot, dtype=dtype, title=f"{adapter.name} ({detection.family}) on {located.name}")
    for warning in warnings:
        say(f"warning: {warning}")
    emit(gap_summary(report), as_json=as_json)
    if measured.within(threshold):
        return 0
    for line in str(refusal(report)).splitlines():
        say(line)
    return 1


def _rounder(lay_in: tuple[str, str] | None) -> Any:
    """What rounds a weight to 4 bits, where the base lay in them; None elsewhere."""
    if lay_in is None or lay_in[0] != "nf4":
        return None
    from gora_serve.training.quantize import nf4_rounder

    return nf4_rounder()
