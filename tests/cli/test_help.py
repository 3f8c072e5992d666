"""Help is complete and instant, and every default of the command line is that of a dataclass."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from typing import Any

import click
import pytest
from shell import TIMEOUT, environment

from gora_serve.cli.main import cli
from gora_serve.config import (
    ConvertConfig,
    DataConfig,
    DemoConfig,
    ExportConfig,
    FitConfig,
    GapConfig,
    MergeConfig,
    ModelConfig,
    PlanConfig,
    ProbeConfig,
    RankConfig,
    ReportConfig,
    ServeConfig,
    TrainConfig,
)

HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "vllm",
    "datasets",
    "rich",
    "numpy",
    "matplotlib",
    "safetensors",
)
SCRIPT = """
import json, sys
from gora_serve.cli.main import run
try:
    sys.argv = ["gora-serve", *json.loads(sys.argv[1])]
    run()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""
COMMANDS = sorted(cli.commands)
# Options whose name says it all. Every other one has help text.
OBVIOUS = {"--rank-min", "--rank-max", "--port", "--seed", "--dtype", "--weight-decay", "--max-grad-norm",
           "--mixed-precision"}  # fmt: skip
# Options that choose files and manners of this one call: they have no place in a configuration.
OF_THE_CALL = {
    "data", "output", "eval_data", "ranks_file", "overwrite", "resume", "as_json", "base", "manifest", "strict",
    "plot", "adapters", "log", "dry_run", "debug", "help", "version",
    "init_adapter", "mutated_base", "cache", "allow_pickle", "leave_out", "carry",
    "quick", "oms", "engine",
    "push", "public", "against", "repo",
    "gaps",
}  # fmt: skip


def run_help(*words: str) -> tuple[int, str, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)], capture_output=True, text=True, env=environment(),
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, set(json.loads(done.stderr.splitlines()[-1]))


def check_light(modules: set[str]) -> None:
    assert "gora_serve" in modules
    assert not modules & set(HEAVY)


def test_help_is_light_and_names_every_command() -> None:
    code, out, modules = run_help("--help")
    assert code == 0
    check_light(modules)
    listed = [line.split()[0] for line in listed_commands(out)]
    assert sorted(listed) == COMMANDS


def listed_commands(out: str) -> list[str]:
    """The lines of the help that name a command, and those that they were wrapped into."""
    sections = out.split("Options:")[1].split("\n\n")[1:]
    return [line for section in sections for line in section.splitlines()[1:]]


def test_a_command_has_one_line_of_a_narrow_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gora_serve", "--help"], capture_output=True, text=True, env=environment(COLUMNS="80"),
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    lines = listed_commands(done.stdout)
    assert sorted(line.split()[0] for line in lines) == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") and len(line) <= 80 for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command_is_light_and_complete(name: str, flag: str) -> None:
    code, out, modules = run_help(name, flag)
    assert code == 0
    check_light(modules)
    assert out.startswith(f"Usage: gora-serve {name} ")
    for option in (parameter for parameter in cli.commands[name].params if isinstance(parameter, click.Option)):
        assert all(spelling in out for spelling in (*option.opts, *option.secondary_opts))


def test_the_check_for_light_modules_can_fail() -> None:
    """`plan` of nothing is refused, after rich was imported to render."""
    code, _, modules = run_help("plan", "/nothing/base", "--json")
    assert code != 0
    assert "rich" in modules


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_explained(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert command.help.strip().splitlines()[0].endswith((".", ":", ","))
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        assert option.help or set(option.opts) & OBVIOUS, f"{name} {option.opts[0]} has no help text"


def parsed(name: str, *words: str) -> dict[str, Any]:
    """The parameters of a command after Click has read them: these words, and defaults for the rest."""
    with (
        click.Context(cli, **cli.context_settings) as parent,
        cli.commands[name].make_context(name, list(words), parent=parent) as context,
    ):
        return context.params


def of(*configs: object) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for config in configs for field in fields(config)}  # type: ignore[arg-type]


FIT = FitConfig()
NAMES = {  # of an option -> of the field, where they differ
    "probe_steps": "steps", "probe_mode": "mode", "probe_memory": "memory", "probe_error": "error", "probe_lr": "lr",
    "rank_rule": "rule",
}  # fmt: skip
SOURCES: dict[str, tuple[tuple[str, ...], list[object]]] = {
    "fit": (("base", "--data", "d", "--output", "o"), [FIT.model, FIT.data, FIT.probe, FIT.ranks, FIT.init, FIT.train]),
    "probe": (("base", "--data", "d", "--output", "o"), [FIT.model, FIT.data, FIT.probe, TrainConfig()]),
    "plan": (("base",), [ServeConfig(), ModelConfig(), RankConfig(), PlanConfig()]),
    "ranks": (("probe",), [RankConfig()]),
    "export": (("run", "--output", "o"), [ExportConfig()]),
    "serve": (("base",), [ServeConfig()]),
    "status": ((), [ServeConfig()]),
    "demo": ((), [DemoConfig()]),
    "convert": (("adapter", "--base", "b", "--output", "o"), [ConvertConfig()]),
    "gap": (("adapter", "--base", "b"), [GapConfig()]),
    "report": (("run",), [ReportConfig()]),
    "bind": (("adapter", "--base", "b", "--output", "o"), []),
    "inspect": (("path",), []),
    "doctor": ((), []),
    "hash": (("base",), []),
    "verify": (("path",), [MergeConfig()]),
    "merge": (("base", "-a", "adapter", "--output", "o"), [MergeConfig()]),
}


def test_every_command_is_compared() -> None:
    assert sorted(SOURCES) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_those_of_the_dataclasses(name: str) -> None:
    words, configs = SOURCES[name]
    found = parsed(name, *words)
    arguments = {parameter.name for parameter in cli.commands[name].params if isinstance(parameter, click.Argument)}
    compared = 0
    for option, value in found.items():
        if option in OF_THE_CALL or option in arguments:
            continue
        expected = default_of(name, option, configs)
        assert value == expected, f"{name} --{option}"
        assert type(value) is type(expected)
        compared += 1
    assert compared == len(found) - len(arguments | (OF_THE_CALL & set(found)))


def default_of(name: str, option: str, configs: list[object]) -> Any:
    special: dict[tuple[str, str], Any] = {
        ("probe", "rank_max"): RankConfig().highest,  # B can be made up to the rank that fit goes to
        ("ranks", "importance"): None,  # the probe's own
        ("plan", "device"): None,  # what this machine has
        ("plan", "memory"): None,
        ("serve", "verify"): False,
    }
    if (name, option) in special:
        return special[name, option]
    if name in ("fit", "probe") and (option.startswith("probe_") or option == "importance"):
        return of(ProbeConfig())[NAMES.get(option, option)]
    if option in ("max_length", "chat_template", "batch_size", "columns"):
        return of(DataConfig())[option]
    if option == "rank_rule":
        return RankConfig().rule
    matching = [of(config)[option] for config in configs if option in of(config)]
    assert matching, f"{name} --{option} has no field"
    return matching[-1]


def test_fit_without_options_is_the_default_configuration() -> None:
    """What the command hands to the library: FitConfig(), field by field."""
    from gora_serve.cli.fitting import _fit_config

    assert _fit_config(parsed("fit", *SOURCES["fit"][0])) == FitConfig()


def test_every_option_of_fit_reaches_the_configuration() -> None:
    """Change each option alone: the configuration must differ from the default."""
    from gora_serve.cli.fitting import _fit_config

    changes = {
        "targets": "q_proj", "dtype": "bfloat16", "offload": "disk", "quantize": "nf4",
        "max_length": "9", "batch_size": "3", "columns": "text=story",
        "probe_steps": "5", "probe_mode": "sketch", "probe_memory": "3", "probe_error": "0.1", "probe_lr": "0.1",
        "importance": "gradient-nuclear", "rank": "5", "rank_min": "1", "rank_max": "64", "rank_rule": "exact",
        "method": "lora", "alpha": "3", "gamma": "0.5", "steps": "7", "epochs": "2", "grad_accum": "2", "lr": "1",
        "lr_ratio": "2", "warmup": "0.5", "weight_decay": "0.5", "max_grad_norm": "1", "mixed_precision": "bf16",
        "eval_every": "3", "save_every": "2", "track": "wandb", "seed": "1",
    }  # fmt: skip
    flags = {"chat_template": "--no-chat-template", "gradient_checkpointing": "--gradient-checkpointing"}
    spelled = {
        parameter.name: parameter.opts[0]
        for parameter in cli.commands["fit"].params
        if isinstance(parameter, click.Option) and parameter.name not in OF_THE_CALL
    }
    assert set(changes) | set(flags) == set(spelled)
    required = SOURCES["fit"][0]
    for name, value in changes.items():
        assert _fit_config(parsed("fit", *required, str(spelled[name]), value)) != FitConfig(), name
    for name, flag in flags.items():
        assert _fit_config(parsed("fit", *required, flag)) != FitConfig(), name
