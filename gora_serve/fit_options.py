"""The option of `fit` for each of its settings, for messages and for commands that repeat a run."""

from __future__ import annotations

from collections.abc import Mapping

# A test runs the words through the command itself and compares what comes out.
OPTIONS: Mapping[str, str] = {
    "model.targets": "--targets", "model.dtype": "--dtype", "model.quantize": "--quantize",
    "model.offload": "--offload",
    "data.max_length": "--max-length", "data.batch_size": "--batch-size", "data.columns": "--columns",
    "probe.steps": "--probe-steps", "probe.mode": "--probe", "probe.memory": "--probe-memory",
    "probe.error": "--probe-error", "probe.lr": "--probe-lr", "probe.importance": "--importance",
    "ranks.rank": "--rank", "ranks.rank_min": "--rank-min", "ranks.rank_max": "--rank-max", "ranks.rule": "--rank-rule",
    "train.method": "--method", "init.alpha": "--alpha", "init.gamma": "--gamma", "train.steps": "--steps",
    "train.epochs": "--epochs", "train.grad_accum": "--grad-accum", "train.lr": "--lr", "train.lr_ratio": "--lr-ratio",
    "train.warmup": "--warmup", "train.weight_decay": "--weight-decay", "train.max_grad_norm": "--max-grad-norm",
    "train.mixed_precision": "--mixed-precision", "train.eval_every": "--eval-every",
    "train.save_every": "--save-every", "train.track": "--track", "train.seed": "--seed",
}  # fmt: skip
SWITCHES: Mapping[str, tuple[str, str]] = {  # setting -> option when true, when false
    "data.chat_template": ("--chat-template", "--no-chat-template"),
    "train.gradient_checkpointing": ("--gradient-checkpointing", ""),
}


def with_option(setting: str) -> str:
    """Return the name of a setting with its option, "train.lr (--lr)"; of one that only Python has, the name."""
    option = OPTIONS.get(setting) or SWITCHES.get(setting, ("",))[0]
    return f"{setting} ({option})" if option else setting
