"""`merge`: adapters and their base as one model, or several adapters as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from gora_serve.cli.options import (
    FOLDER,
    Weighted,
    json_option,
    overwrite_option,
    source_options,
)
from gora_serve.config import BaseAs, Form, MergeConfig, MergeDtype, MergeInto, MergeMethod
from gora_serve.errors import UsageError

if TYPE_CHECKING:
    from converters.reading import Inputs
    from gora_serve.cli.render import Summary
    from gora_serve.integrity.bases import Base


@click.command(short_help="Merge adapters into their base, or into one adapter.")
@click.argument("base")
@click.option(
    "-a", "--adapter", "adapters", multiple=True, required=True, type=Weighted(),
    help="What is merged, and how much of it (1 where nothing is said). Repeatable.",
)  # fmt: skip
@click.option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder of the merged model, or adapter.")
@click.option(
    "--into", default=MergeConfig.into, show_default=True, type=click.Choice(get_args(MergeInto)),
    help="model: the base's shards with the updates added. adapter: one adapter instead of several.",
)  # fmt: skip
@click.option(
    "--dtype", default=MergeConfig.dtype, show_default=True, type=click.Choice(get_args(MergeDtype)),
    help="Of the result. auto: a model keeps each tensor's, an adapter gets float32.",
)  # fmt: skip
@click.option(
    "--base-as", default=MergeConfig.base_as, show_default=True, type=click.Choice(get_args(BaseAs)),
    help="For adapters trained on a base in 4 bits: add to the weights as stored (bf16, and auto), or to what NF4 "
    "makes of them. Both errors are stated.",
)  # fmt: skip
@click.option(
    "--method", default=MergeConfig.method, show_default=True, type=click.Choice(get_args(MergeMethod)),
    help="Of --into adapter. cat: the exact sum. linear: the weighted mean. svd: the sum, no larger than the largest "
    "adapter. ties: trimmed, signs elected. dare: entries dropped at random, the rest rescaled.",
)  # fmt: skip
@click.option(
    "--density", type=float, default=MergeConfig.density, metavar="D",
    help="The share of entries that ties (0.2 where nothing is said) and dare (0.5) keep.",
)  # fmt: skip
@click.option("--rank", type=int, default=MergeConfig.rank, metavar="R", help="Of --into adapter: as for convert.")
@click.option(
    "--tolerance", type=float, default=MergeConfig.tolerance, metavar="T", help="Of --into adapter: as for convert."
)
@click.option(
    "--parameters", type=int, default=MergeConfig.parameters, metavar="N",
    help="Of --into adapter: most parameters over all modules.",
)  # fmt: skip
@click.option(
    "--form", default=MergeConfig.form, show_default=True, type=click.Choice(get_args(Form)),
    help="Of --into adapter: as for export.",
)  # fmt: skip
@click.option("--seed", default=MergeConfig.seed, show_default=True, help="Of dare, which draws what it drops.")
@source_options
@overwrite_option
@json_option
def merge(
    base: str,
    adapters: tuple[tuple[str, float], ...],
    output: Path,
    into: MergeInto,
    dtype: MergeDtype,
    base_as: BaseAs,
    method: MergeMethod,
    density: float | None,
    rank: int | None,
    tolerance: float | None,
    parameters: int | None,
    form: Form,
    seed: int,
    family: str,
    init_adapter: Path | None,
    mutated_base: Path | None,
    cache: Path | None,
    allow_pickle: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge adapters into their base, as a model of the same shards, or into each other.

    ADAPTER is a run, or anything that convert reads, DoRA and other updates of full rank included. Each weight is
    summed in float32 or better and rounded once; never more than a part of one tensor is in memory. merge.json tells
    what went in, and how many elements of each tensor the update changed at all; `verify MERGED --base BASE -a ADAPTER`
    replays it. --init-adapter, --mutated-base and --cache are for a single adapter.
    """
    from gora_serve.cli.render import emit, say
    from gora_serve.cli.watching import watching
    from gora_serve.integrity.bases import locate_adapter, locate_base
    from gora_serve.integrity.reading import naming_inputs

    config = MergeConfig(
        family, into, dtype, base_as, method, rank, tolerance, parameters, density, form, seed
    )  # fmt: skip
    config.validate()
    if len(adapters) > 1 and (init_adapter or mutated_base or cache):
        raise UsageError(
            "--init-adapter, --mutated-base and --cache are of one adapter, and several are given", code="GS-264",
            hint="convert these adapters one by one, and merge what convert wrote",
        )  # fmt: skip
    with watching() as listen, naming_inputs():
        from converters.reading import Inputs

        inputs = Inputs(None, init_adapter, mutated_base, cache, allow_pickle, listen)
        folders = [(locate_adapter(name), weight) for name, weight in adapters]
        write = _into_model if config.into == "model" else _into_adapter
        summary = write(folders, locate_base(base), output, config, inputs, overwrite)
    for warning in summary.value["warnings"]:
        say(f"warning: {warning}")
    emit(summary, as_json=as_json)


def _into_model(
    adapters: Sequence[tuple[Path, float]], base: Base, output: Path, config: MergeConfig, inputs: Inputs,
    overwrite: bool,
) -> Summary:  # fmt: skip
    from converters.merging import merge_model
    from gora_serve.cli.render_merge import model_summary
    from gora_serve.training.quantize import nf4_rounder

    done = merge_model(adapters, base, output, config, inputs, rounder=nf4_rounder, overwrite=overwrite)
    return model_summary(done)


def _into_adapter(
    adapters: Sequence[tuple[Path, float]], base: Base, output: Path, config: MergeConfig, inputs: Inputs,
    overwrite: bool,
) -> Summary:  # fmt: skip
    from converters.combining import merge_adapters
    from gora_serve.cli.render_combine import adapter_summary

    return adapter_summary(merge_adapters(adapters, base, output, config, inputs, overwrite=overwrite))
