"""Options that several commands share. Every default is read from the dataclasses in config.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import click

from gora_serve.config import (
    IMPORTANCES,
    ConvertConfig,
    DataConfig,
    Importance,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    Track,
    TrainConfig,
)  # fmt: skip

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(dir_okay=False, path_type=Path)


class Folder(click.Path):
    """A folder, which need not be there yet; a file is refused with what to give instead."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if Path(value).is_file():
            better = "choose another name" if param and param.name == "output" else "give the folder that it lies in"
            self.fail(f"{str(value)!r} is a file, and a folder is needed: {better}", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = Folder(file_okay=False, path_type=Path)


def together(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine option decorators into one; help shows them in the order given."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Gamma(click.ParamType[float | Literal["auto"]]):
    """A number, or the word auto."""

    name = "F|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | Literal["auto"]:
        if value == "auto":
            return "auto"
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto'", param, ctx)


class Steps(click.ParamType[int | Literal["auto"]]):
    """A number of steps, or the word auto."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor 'auto'", param, ctx)


class Metrics(click.ParamType[tuple[Importance, ...]]):
    """One importance metric, or several with commas: the first decides the ranks."""

    name = "|".join(IMPORTANCES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Importance, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        for name in names:
            if name not in IMPORTANCES:
                self.fail(f"{name!r} is not one of {', '.join(IMPORTANCES)}", param, ctx)
        return names  # type: ignore[return-value]


class Weighted(click.ParamType[tuple[str, float]]):
    """ADAPTER or ADAPTER:WEIGHT; a path that is there as it is written has no weight."""

    name = "ADAPTER[:WEIGHT]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        text = str(value)
        if not text:
            self.fail("an adapter needs a name: a folder, a file or a hub id", param, ctx)
        place, colon, number = text.rpartition(":")
        if not colon or os.path.exists(text):  # noqa: PTH110 - no error for long names
            return text, 1.0
        try:
            weight = float(number)
        except ValueError:
            if os.path.exists(place):  # noqa: PTH110
                self.fail(f"the weight of {place} is no number: {number!r}", param, ctx)
            return text, 1.0
        plain = number.isascii() and "_" not in number  # float takes 1_0 and digits of any script
        if not place or not plain or not abs(weight) < float("inf"):
            self.fail(f"{text!r} is no adapter with a finite weight", param, ctx)
        return place, weight


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output, whole, at the end.")
quick_option = click.option(
    "--quick", is_flag=True, help="Read no file again that stands as it stood when it was hashed. No proof: level L0."
)
data_option = click.option(
    "--data",
    required=True,
    metavar="FILE|DATASET",
    help="JSONL, JSON, CSV or Parquet file, or a hub dataset: NAME, NAME:CONFIGURATION, NAME::test.",
)

source_options = together(
    click.option(
        "--from", "family", default=ConvertConfig.family, show_default=True, metavar="auto|FAMILY",
        help="The family of the adapter: lora, pissa, lora_ga, dora, loha, mlx ... auto: decided from the files.",
    ),
    click.option(
        "--init-adapter", type=click.Path(path_type=Path), metavar="DIR",
        help="The adapter as it was right after its initialisation: what was taken out of the base.",
    ),
    click.option(
        "--mutated-base", type=FOLDER, metavar="DIR",
        help="The base as the initialisation left it: the same, from the difference of the weights.",
    ),
    click.option("--cache", type=FILE, metavar="FILE", help="CorDA's cache file: the same, as CorDA keeps it."),
    click.option(
        "--allow-pickle", is_flag=True, help="Open .bin, .pt and .ckpt files too, by torch's loader for weights only."
    ),
)  # fmt: skip
keep_options = together(
    click.option(
        "--leave-out", multiple=True, metavar="NAMES",
        help="Drop tensors that LoRA cannot hold (biases, norms), where their name has this (a regular expression). "
        "Repeatable.",
    ),
    click.option(
        "--carry", multiple=True, metavar="NAMES",
        help="Of a fine-tuned model: keep such modules whole (modules_to_save): PEFT loads them, vLLM does not.",
    ),
)  # fmt: skip
model_options = together(
    click.option(
        "--targets", default=ModelConfig.targets, show_default=True, metavar="all-linear|attention|NAMES|REGEX",
        help="Which modules are adapted: a word, names with commas (q_proj,v_proj), or a regex for whole paths.",
    ),
    click.option(
        "--dtype", default=ModelConfig.dtype, show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16"]),
        help="Of the base's weights in memory; auto: as stored. LoRA factors are float32.",
    ),
    click.option(
        "--quantize", default=ModelConfig.quantize, show_default=True, type=click.Choice(["none", "nf4"]),
        help="nf4: the base's linear layers in 4 bits, by bitsandbytes; they compute in --dtype.",
    ),
    click.option(
        "--offload", default=ModelConfig.offload, show_default=True, type=click.Choice(["none", "cpu", "disk"]),
        help="Keep the base's weights on the CPU or on disk; the device holds one block's at a time.",
    ),
)  # fmt: skip
data_options = together(
    click.option(
        "--max-length", default=DataConfig.max_length, show_default=True,
        help="Most tokens of a row; of prompt and completion each, for an encoder-decoder. Longer rows are cut, or "
        "left out where the prompt alone is too long.",
    ),
    click.option(
        "--chat-template/--no-chat-template", default=DataConfig.chat_template, show_default=True,
        help="Use the tokenizer's chat template where it has one.",
    ),
    click.option("--batch-size", default=DataConfig.batch_size, show_default=True, help="Rows of a micro-batch."),
    click.option(
        "--columns", default=DataConfig.columns, metavar="prompt=COLUMN,completion=COLUMN",
        help="Where the data, that of --eval-data too, calls them otherwise; or messages=COLUMN, or text=COLUMN.",
    ),
)  # fmt: skip
probe_options = together(
    click.option(
        "--probe-steps", default=str(ProbeConfig.steps), show_default=True, type=Steps(), metavar=Steps.name,
        help="Micro-batches of the gradient probe, over all processes; auto: stop once the ranks stand still, "
        f"at {ProbeConfig.longest} at the latest.",
    ),
    click.option(
        "--probe", "probe_mode", default=ProbeConfig.mode, show_default=True,
        type=click.Choice(["exact", "sketch", "auto"]),
        help="exact: whole gradients in float32. sketch: only what B needs of them and a sample of rows, in a "
        "fraction of the memory. auto: exact while they fit --probe-memory.",
    ),
    click.option(
        "--probe-memory", type=float, default=ProbeConfig.memory, metavar="GIB", show_default="half of what is free",
        help="Most memory for whole gradients.",
    ),
    click.option(
        "--probe-error", default=ProbeConfig.error, show_default=True,
        help="Relative standard error of a sketch's importances: sets how many rows are sampled.",
    ),
    click.option(
        "--probe-lr", default=ProbeConfig.lr, show_default=True,
        help="GoRA-pro: between micro-batches the weights take SGD steps of this size, undone after the probe.",
    ),
    click.option(
        "--importance", default=",".join(ProbeConfig.importance), show_default=True, type=Metrics(),
        metavar=Metrics.name,
        help="How important a module is (paper, table 6). Several with commas: the first decides.",
    ),
)  # fmt: skip
rank_options = together(
    click.option("--rank", default=RankConfig.rank, show_default=True, help="Reference rank: sets the budget."),
    click.option("--rank-min", type=int, default=RankConfig.rank_min, show_default="rank / 2"),
    click.option("--rank-max", type=int, default=RankConfig.rank_max, show_default="4 * rank"),
    click.option(
        "--rank-rule", default=RankConfig.rule, show_default=True, type=click.Choice(["paper", "exact"]),
        help="paper: equation 8. exact: as many parameters as LoRA's, never more.",
    ),
)  # fmt: skip
train_options = together(
    click.option(
        "--method", default=TrainConfig.method, show_default=True, type=click.Choice(["gora", "lora"]),
        help="lora: the baseline, one rank, B = 0, in the same loop.",
    ),
    click.option(
        "--alpha", default=InitConfig.alpha, show_default=True, help="Forward scale: alpha / sqrt(rank); LoRA: / rank."
    ),
    click.option(
        "--gamma", default=str(InitConfig.gamma), show_default=True, type=Gamma(), metavar=Gamma.name,
        help="Size of the first step; auto: searched by forward passes on rows kept from the probe.",
    ),
    click.option("--steps", type=int, default=TrainConfig.steps, help="Optimiser steps.  [default: one epoch]"),
    click.option("--epochs", type=float, default=TrainConfig.epochs, help="Passes over the data, instead of --steps."),
    click.option(
        "--grad-accum", default=TrainConfig.grad_accum, show_default=True, help="Micro-batches of an optimiser step."
    ),
    click.option(
        "--lr", default=TrainConfig.lr, show_default=True,
        help="Learning rate of A. The default is the paper's, for 8B models; under 1B, 1e-4 to 4e-4 does better.",
    ),
    click.option(
        "--lr-ratio", type=float, default=TrainConfig.lr_ratio, show_default="16; lora: 1",
        help="How much faster B learns.",
    ),
    click.option("--warmup", default=TrainConfig.warmup, show_default=True, help="Share of the steps."),
    click.option("--weight-decay", default=TrainConfig.weight_decay, show_default=True),
    click.option("--max-grad-norm", type=float, default=TrainConfig.max_grad_norm, show_default="no clipping"),
    click.option(
        "--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), default=TrainConfig.mixed_precision,
        show_default="Accelerate's configuration",
    ),
    click.option(
        "--gradient-checkpointing", is_flag=True, default=TrainConfig.gradient_checkpointing,
        help="Recompute each block's activations: less memory, more time.",
    ),
    click.option("--eval-every", type=int, default=TrainConfig.eval_every, help="Steps between evaluations."),
    click.option(
        "--save-every", type=int, default=TrainConfig.save_every, show_default="a tenth of the run",
        help="Steps between checkpoints, for --resume; the newest two are kept.",
    ),
    click.option(
        "--track", default=TrainConfig.track, show_default=True, type=click.Choice(get_args(Track)),
        help="Where the lines of metrics.jsonl go as well: TensorBoard files in RUN/tracking, or Weights & Biases.",
    ),
)  # fmt: skip
seed_option = click.option("--seed", default=TrainConfig.seed, show_default=True)
