"""`fit`, `probe` and `ranks`: from a base and data to an adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from gora_serve.cli.options import (
    FILE,
    FOLDER,
    Metrics,
    data_option,
    data_options,
    json_option,
    model_options,
    overwrite_option,
    probe_options,
    rank_options,
    seed_option,
    train_options,
)  # fmt: skip
from gora_serve.config import (
    DataConfig,
    FitConfig,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    TrainConfig,
)  # fmt: skip


@click.command(short_help="Train an adapter for one task with GoRA, from a base and data.")
@click.argument("base")
@data_option
@click.option("--output", required=True, type=FOLDER, metavar="RUN", help="Run folder, made when the run is complete.")
@click.option("--eval-data", metavar="FILE|DATASET", help="Rows to measure the loss on: before, after, --eval-every.")
@model_options
@data_options
@probe_options
@rank_options
@click.option("--ranks", "ranks_file", type=FILE, help="Take the ranks from this ranks.json, perhaps edited.")
@train_options
@seed_option
@click.option("--resume", is_flag=True, help="Go on with RUN.partial, if there is one, to the same adapter.")
@overwrite_option
@json_option
def fit(base: str, data: str, output: Path, **options: Any) -> None:
    """Train an adapter for one task: probe gradients, give each module its rank, initialise, train.

    BASE is a model folder or a hub id. Its weights are never changed: they are hashed before and after.
    While the run goes on it is RUN.partial; that is also what a failed, stopped or killed run leaves behind, and
    what --resume goes on with.
    On several GPUs: accelerate launch --multi_gpu -m gora_serve fit BASE ...
    """
    from gora_serve.cli.render import emit, say
    from gora_serve.cli.render_fit import fit_summary
    from gora_serve.cli.stopping import stopping
    from gora_serve.cli.watching import watching
    from gora_serve.training.fit import fit as fit_adapter

    config = _fit_config(options)
    with watching() as listen, stopping() as stop:
        result = fit_adapter(
            base,
            data,
            output,
            config,
            eval_data=options["eval_data"],
            ranks_file=options["ranks_file"],
            overwrite=options["overwrite"],
            resume=options["resume"],
            stop=stop,
            listen=listen,
        )
    emit(fit_summary(result), as_json=options["as_json"])
    adapter = output.with_name(f"{output.name}-adapter")
    say(f"next: {shlex.join(['gora-serve', 'export', str(output), '--output', str(adapter)])}")


def _fit_config(options: dict[str, Any]) -> FitConfig:
    """Sort the options of `fit` into its dataclasses. Fields without an option keep their default."""
    train = ("method", "steps", "epochs", "grad_accum", "lr", "lr_ratio", "warmup", "weight_decay", "max_grad_norm",
             "mixed_precision", "gradient_checkpointing", "eval_every", "save_every",
             "track", "seed")  # fmt: skip
    return FitConfig(
        model=_model_config(options),
        data=_data_config(options),
        probe=_probe_config(options),
        ranks=_rank_config(options),
        init=InitConfig(options["alpha"], options["gamma"]),
        train=TrainConfig(**{name: options[name] for name in train}),
    )


def _data_config(options: dict[str, Any]) -> DataConfig:
    return DataConfig(options["max_length"], options["chat_template"], options["batch_size"], options["columns"])


def _probe_config(options: dict[str, Any]) -> ProbeConfig:
    return ProbeConfig(
        steps=options["probe_steps"],
        mode=options["probe_mode"],
        importance=options["importance"],
        memory=options["probe_memory"],
        error=options["probe_error"],
        lr=options["probe_lr"],
    )


def _model_config(options: dict[str, Any]) -> ModelConfig:
    return ModelConfig(options["targets"], options["dtype"], options["quantize"], options["offload"])


def _rank_config(options: dict[str, Any]) -> RankConfig:
    return RankConfig(options["rank"], options["rank_min"], options["rank_max"], options["rank_rule"])


@click.command(short_help="Measure the gradients of a base on data, without training.")
@click.argument("base")
@data_option
@click.option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder for probe.json and its statistics.")
@model_options
@data_options
@probe_options
@click.option(
    "--rank-max", default=RankConfig().highest, show_default=True, type=click.IntRange(min=1),
    help="Largest rank that B can be made for later.",
)  # fmt: skip
@seed_option
@overwrite_option
@json_option
def probe(base: str, data: str, output: Path, **options: Any) -> None:
    """Measure the gradients of the base on the data, without training: the statistics alone.

    With --probe-steps auto it stops once the ranks that fit would give by default stand still.
    """
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_fit import probe_summary
    from gora_serve.cli.watching import watching
    from gora_serve.training.probe_run import probe_only

    config = FitConfig(
        model=_model_config(options),
        data=_data_config(options),
        probe=_probe_config(options),
        train=TrainConfig(seed=options["seed"]),
    )
    with watching() as listen:
        result = probe_only(
            base, data, output, config, rank_max=options["rank_max"], overwrite=options["overwrite"], listen=listen
        )
    emit(probe_summary(output, result), as_json=options["as_json"])


@click.command(short_help="Allocate ranks anew from a probe: other budget, rule or metric.")
@click.argument("probe", type=FOLDER)
@rank_options
@click.option(
    "--importance", type=Metrics(), default=None, metavar=Metrics.name,
    help="Metric to allocate by.  [default: the probe's]",
)  # fmt: skip
@click.option("--output", type=FILE, help="Write ranks.json, to edit and give to fit --ranks.")
@click.option("--plot", type=FILE, help="Draw the ranks by layer and module as a picture (figure 3a of the paper).")
@overwrite_option
@json_option
def ranks(
    probe: Path, importance: tuple[str, ...] | None, output: Path | None, plot: Path | None, **options: Any
) -> None:
    """Allocate ranks anew from a probe: other budget, bounds, rule or metric. Takes no model and no time.

    PROBE is the folder of `probe`, or a run folder of `fit`.
    """
    from gora_serve.cli.render import emit
    from gora_serve.cli.render_fit import ranks_summary
    from gora_serve.gora.ranks import allocate_ranks
    from gora_serve.integrity.file_targets import check_file
    from gora_serve.integrity.files import make_parents, write_json
    from gora_serve.training.run_files import probe_importances, probe_shapes, ranks_json, read_probe

    if plot:
        from gora_serve.pictures import check_picture

        check_picture(plot, overwrite=options["overwrite"])
    if output:
        check_file(output, "ranks", overwrite=options["overwrite"])
    measured = read_probe(probe)
    values = probe_importances(measured, importance[0] if importance else None)
    plan = allocate_ranks(values, probe_shapes(measured), _rank_config(options))
    if output:
        write_json(make_parents(output), ranks_json(plan), overwrite=options["overwrite"])
    if plot:
        from gora_serve.pictures import plot_ranks

        plot_ranks(plan, plot)
    emit(ranks_summary(plan, output, plot), as_json=options["as_json"])
