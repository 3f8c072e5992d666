"""`fit --resume`: whatever ended a run, going on gives the files that an unbroken run gives, bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import content, killed_after, killed_at, operations_of
from safetensors.torch import load_file, save_file
from tiny_models import color_rows, write_jsonl

from gora_serve.cli.main import cli
from gora_serve.cli.stopping import stopping
from gora_serve.config import (
    DataConfig,
    FitConfig,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    TrainConfig,
)
from gora_serve.errors import BindingError, InputError, OutputError, RunError, Stopped, UsageError
from gora_serve.integrity.files import staged_folder
from gora_serve.progress import Progress
from gora_serve.training import loop
from gora_serve.training.checkpoint import newest_checkpoint
from gora_serve.training.fit import fit
from gora_serve.training.resume import Left, check_gamma, check_same, decisive, digests
from gora_serve.training.run import FitResult

STEPS = 6
CONFIG = FitConfig(
    model=ModelConfig(dtype="float32"),
    data=DataConfig(max_length=96, batch_size=4),
    probe=ProbeConfig(steps=2),
    ranks=RankConfig(rank=2),
    init=InitConfig(gamma="auto", search_batches=1),
    train=TrainConfig(steps=STEPS, lr=1e-3, eval_every=3, save_every=2, max_grad_norm=1.0),
)
LORA = replace(CONFIG, train=replace(CONFIG.train, method="lora"))
Fit = Callable[..., FitResult]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("held-out") / "eval.jsonl", color_rows(48)[40:])


@pytest.fixture(scope="module")
def fitting(tiny_base: Path, tiny_data: Path, held_out: Path) -> Fit:
    def run(output: Path, config: FitConfig = CONFIG, **options: Any) -> FitResult:
        inputs = {"base": tiny_base, "data": tiny_data, "eval_data": held_out} | options
        base, data, eval_data = (str(inputs.pop(name)) for name in ("base", "data", "eval_data"))
        return fit(base, data, output, config, eval_data=eval_data, **inputs)

    return run


@pytest.fixture(scope="module")
def unbroken(fitting: Fit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    fitting(run)
    return content(run)


@pytest.fixture(scope="module")
def broken(fitting: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 5 of 6: with checkpoints of steps 4 and 5. Copy it before you edit it."""
    run = tmp_path_factory.mktemp("broken") / "run"
    stop_after(fitting, run, 5)
    return run.with_name("run.partial")


@pytest.fixture
def copied(broken: Path, tmp_path: Path) -> Path:
    """The output whose unfinished run is a copy of `broken`."""
    shutil.copytree(broken, tmp_path / "run.partial")
    return tmp_path / "run"


def stop_after(fitting: Fit, run: Path, step: int, config: FitConfig = CONFIG, **options: Any) -> Stopped:
    """Fit, with a SIGTERM during this training step."""
    seen: list[int] = []

    def listen(event: Progress) -> None:
        if event.stage == "train":
            seen.append(event.done)

    with pytest.raises(Stopped) as caught:
        fitting(run, config, listen=listen, stop=lambda: signal.SIGTERM if step in seen else None, **options)
    return caught.value


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# SIGKILL


def strata(total: int, count: int, seed: int) -> list[int]:
    """`count` random numbers from 1 to `total`, one in each of as many equal parts."""
    generator = random.Random(seed)
    edges = [1 + total * part // count for part in range(count + 1)]
    return [generator.randrange(low, high) for low, high in itertools.pairwise(edges)]


@pytest.fixture(scope="module")
def operations(fitting: Fit, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many file operations on its folder a run takes."""
    folder = tmp_path_factory.mktemp("counted")
    return operations_of(lambda: fitting(folder / "run"), folder=folder, log=folder.with_suffix(".log"))


@pytest.mark.parametrize("part", range(5))
def test_killed_at_a_file_operation(
    fitting: Fit, unbroken: dict[str, object], operations: int, tmp_path: Path, part: int
) -> None:
    folder, log = tmp_path / "runs", tmp_path / "log"
    folder.mkdir()
    at = strata(operations, 5, seed=1)[part]
    assert killed_at(at, lambda: fitting(folder / "run"), folder=folder, log=log) == -signal.SIGKILL, log.read_text()
    assert not (folder / "run").exists()
    fitting(folder / "run", resume=True)
    assert content(folder / "run") == unbroken
    assert [path.name for path in folder.iterdir()] == ["run"], "no lock, stage or partial run is left"


def test_killed_again_and_again(fitting: Fit, unbroken: dict[str, object], operations: int, tmp_path: Path) -> None:
    """Each resumption is killed too, at a later operation of its own, until one comes through."""
    folder, log = tmp_path / "runs", tmp_path / "log"
    folder.mkdir()
    ends = [
        killed_at(at, lambda: fitting(folder / "run", resume=True), folder=folder, log=log)
        for at in strata(operations // 2, 4, seed=2)
    ]
    assert ends[:2] == [-signal.SIGKILL, -signal.SIGKILL]
    if not (folder / "run").exists():
        fitting(folder / "run", resume=True)
    assert content(folder / "run") == unbroken


@pytest.mark.slow
def test_killed_at_twenty_random_moments(fitting: Fit, unbroken: dict[str, object], tmp_path: Path) -> None:
    started = time.perf_counter()
    assert killed_at(0, lambda: fitting(tmp_path / "timed" / "run"), folder=tmp_path, log=tmp_path / "log") == 0
    lasts = time.perf_counter() - started
    generator = random.Random(3)
    same = []
    for number in range(20):
        run, log = tmp_path / str(number) / "run", tmp_path / f"{number}.log"
        end = killed_after(generator.uniform(0, 0.95 * lasts), lambda run=run: fitting(run), log=log)  # type: ignore[misc]
        if end == -signal.SIGKILL and not run.exists():  # it may have been published just before
            fitting(run, resume=True)
        same.append(content(run) == unbroken)
    assert same == [True] * 20


# What is not repeated, and what is


def test_finished_stages_are_not_repeated(fitting: Fit, unbroken: dict[str, object], copied: Path) -> None:
    events: list[Progress] = []
    result = fitting(copied, resume=True, listen=events.append)
    assert {event.stage for event in events} == {"hash", "train"}
    assert [event.done for event in events if event.stage == "train"] == [6]
    assert content(copied) == unbroken
    assert json.loads((copied / "run.json").read_text())["resumed_from"] == 5
    assert set(result.losses) == {"base", "start", "step 3", "end"}


@pytest.mark.parametrize("stage", ["probe", "gamma"])
def test_stopped_before_training(fitting: Fit, unbroken: dict[str, object], tmp_path: Path, stage: str) -> None:
    """The stage that was stopped is made anew, the ones before it are not."""
    run = tmp_path / "run"
    stages: list[str] = []

    def listen(event: Progress) -> None:
        stages.append(event.stage)

    with pytest.raises(Stopped, match=f"stopped by SIGINT during {stage}") as caught:
        fitting(run, listen=listen, stop=lambda: signal.SIGINT if stage in stages else None)
    assert caught.value.exit_code == 130
    assert "--resume" in str(caught.value)
    assert json.loads((tmp_path / "run.partial" / "run.json").read_text())["status"] == "stopped"
    stages.clear()
    fitting(run, resume=True, listen=listen)
    assert ("probe" in stages) == (stage == "probe")
    assert content(run) == unbroken


def test_with_nothing_there_a_new_run_starts(fitting: Fit, unbroken: dict[str, object], tmp_path: Path) -> None:
    fitting(tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == unbroken


def test_other_checkpoints_same_adapter(fitting: Fit, unbroken: dict[str, object], copied: Path) -> None:
    fitting(copied, replace(CONFIG, train=replace(CONFIG.train, save_every=None)), resume=True)
    assert content(copied) == unbroken


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_weights_may_move_elsewhere(fitting: Fit, unbroken: dict[str, object], copied: Path, offload: Any) -> None:
    fitting(copied, replace(CONFIG, model=replace(CONFIG.model, offload=offload)), resume=True)
    assert content(copied) == unbroken


def test_lora(fitting: Fit, tmp_path: Path) -> None:
    fitting(tmp_path / "whole", LORA)
    stop_after(fitting, tmp_path / "run", 3, LORA)
    fitting(tmp_path / "run", LORA, resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_dropout_draws_the_same_numbers(fitting: Fit, tiny_gpt2: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.2, "attn_pdrop": 0.1, "embd_pdrop": 0.1}))
    fitting(tmp_path / "whole", base=base)
    fitting(tmp_path / "dry", base=tiny_gpt2)
    stop_after(fitting, tmp_path / "run", 3, base=base)
    torch.manual_seed(12345)
    fitting(tmp_path / "run", resume=True, base=base)
    whole, dry = content(tmp_path / "whole"), content(tmp_path / "dry")
    assert content(tmp_path / "run") == whole
    assert whole["metrics.jsonl"] != dry["metrics.jsonl"], "the base does drop out"


@pytest.mark.parametrize("step", [2, 4, 5])
def test_gradient_accumulation(fitting: Fit, tmp_path: Path, step: int) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, grad_accum=2))
    fitting(tmp_path / "whole", config)
    stop_after(fitting, tmp_path / "run", step, config)
    fitting(tmp_path / "run", config, resume=True)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "gora_manifest.json", None])
def test_a_damaged_newest_checkpoint_is_passed_over(
    fitting: Fit, unbroken: dict[str, object], copied: Path, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    newest = copied.with_name("run.partial") / "checkpoints" / "step-5"
    if name is None:
        (newest / "gora_manifest.json").unlink()
    else:
        flip(newest / name)
    events: list[Progress] = []
    fitting(copied, resume=True, listen=events.append)
    assert [event.done for event in events if event.stage == "train"] == [5, 6]
    assert len(warnings_of(caplog)) == 1
    assert "step-5" in warnings_of(caplog)[0]
    assert content(copied) == unbroken


def test_without_a_whole_checkpoint_training_starts_anew(
    fitting: Fit, unbroken: dict[str, object], copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (copied.with_name("run.partial") / "checkpoints").iterdir():
        flip(folder / "state.safetensors")
    fitting(copied, resume=True)
    assert len(warnings_of(caplog)) == 2
    assert content(copied) == unbroken


def test_a_damaged_probe_is_made_anew(
    fitting: Fit, unbroken: dict[str, object], copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(copied.with_name("run.partial") / "probe" / "statistics.safetensors")
    fitting(copied, resume=True)
    assert ["probing again" in message for message in warnings_of(caplog)] == [True]
    assert content(copied) == unbroken


@pytest.mark.parametrize("ending", ['{"step": 6, "loss"', '{"step": 6, "loss": 1.0}\n{"st', "\0\0\0", ""])
def test_a_torn_line_of_metrics_is_cut(fitting: Fit, unbroken: dict[str, object], copied: Path, ending: str) -> None:
    with (copied.with_name("run.partial") / "metrics.jsonl").open("a") as file:
        file.write(ending)
    fitting(copied, resume=True)
    assert content(copied) == unbroken


@pytest.mark.parametrize("damage", ["lost", "junk", "beginning"])
def test_lost_metrics_are_told(
    fitting: Fit, unbroken: dict[str, object], copied: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = copied.with_name("run.partial") / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if damage == "lost":
        file.unlink()
    else:
        file.write_text("junk\n\0" if damage == "junk" else "".join(lines[5:]))
    fitting(copied, resume=True)
    assert ["metrics.jsonl has lost the lines of" in message for message in warnings_of(caplog)] == [True]
    after = content(copied)
    assert {**after, "metrics.jsonl": None} == {**unbroken, "metrics.jsonl": None}
    assert json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS


# Refusals


@pytest.fixture(scope="module")
def others(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Inputs that differ from those of `broken`, by what differs."""
    folder = tmp_path_factory.mktemp("others")
    base = shutil.copytree(tiny_base, folder / "base")
    for file in base.glob("*.safetensors"):
        save_file({k: v + 0.25 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    template = shutil.copytree(tiny_base, folder / "template")
    (template / "chat_template.jinja").write_text(
        (template / "chat_template.jinja").read_text().replace("<|im_end|>", "<|im_end|> ")
    )
    rows = write_jsonl(folder / "rows.jsonl", color_rows(41))
    ranks = folder / "ranks.json"
    ranks.write_text(json.dumps({"schema": "gora-serve/ranks/1", "ranks": {"model.layers.0.mlp.up_proj": 2}}))
    return {
        "base's weights root": {"base": base},
        "base's tokenizer root": {"base": template},
        "data sha256": {"data": rows},
        "eval_data sha256": {"eval_data": rows},
        "ranks_file": {"ranks_file": ranks},
        "train.lr": {"config": replace(CONFIG, train=replace(CONFIG.train, lr=2e-3))},
        "init.gamma": {"config": replace(CONFIG, init=InitConfig(gamma=0.1, search_batches=1))},
        "ranks.rank": {"config": replace(CONFIG, ranks=RankConfig(rank=3))},
    }


@pytest.mark.parametrize(
    "name",
    ["base's weights root", "base's tokenizer root", "data sha256", "eval_data sha256", "ranks_file", "train.lr",
     "init.gamma", "ranks.rank"],
)  # fmt: skip
def test_another_run_is_refused_by_what_differs(fitting: Fit, copied: Path, others: dict[str, Any], name: str) -> None:
    before = state(copied.parent)
    with pytest.raises(BindingError, match="GS-420") as caught:
        fitting(copied, resume=True, **others[name])
    assert caught.value.exit_code == 4
    assert name in caught.value.what
    assert "seed" not in caught.value.what
    assert state(copied.parent) == before


def test_a_mixed_precision_of_the_environment_is_recorded_and_must_be_the_same(
    fitting: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    stop_after(fitting, tmp_path / "run", 2, LORA)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    before = state(tmp_path)
    with pytest.raises(BindingError, match="GS-420") as caught:
        fitting(tmp_path / "run", LORA, resume=True)
    assert caught.value.what == "the unfinished run differs in: mixed_precision"
    assert (caught.value.fields["expected"], caught.value.fields["actual"]) == (
        "mixed_precision bf16", "mixed_precision None",
    )  # fmt: skip
    assert state(tmp_path) == before
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    adapter = fitting(tmp_path / "run", LORA, resume=True).adapter
    assert json.loads(adapter.origin["settings"])["mixed_precision"] == "bf16"


def test_a_checkpoint_of_another_run_is_refused(fitting: Fit, copied: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, seed=7))
    stop_after(fitting, tmp_path / "other", 5, config)
    partial = copied.with_name("run.partial")
    shutil.rmtree(partial / "checkpoints")
    shutil.copytree(tmp_path / "other.partial" / "checkpoints", partial / "checkpoints")
    with pytest.raises(BindingError, match="GS-422"):
        fitting(copied, resume=True)


def test_edited_ranks_are_refused(fitting: Fit, copied: Path) -> None:
    file = copied.with_name("run.partial") / "ranks.json"
    ranks = json.loads(file.read_text())
    ranks["ranks"]["model.layers.0.mlp.up_proj"] += 1
    file.write_text(json.dumps(ranks))
    with pytest.raises(BindingError, match="GS-423") as caught:
        fitting(copied, resume=True)
    assert "--ranks" in str(caught.value)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_an_edited_gamma_is_refused(fitting: Fit, copied: Path, checkpoints: bool) -> None:
    partial = copied.with_name("run.partial")
    if not checkpoints:
        shutil.rmtree(partial / "checkpoints")
    gamma = json.loads((partial / "gamma.json").read_text())
    (partial / "gamma.json").write_text(json.dumps(gamma | {"gamma": gamma["gamma"] * 2}))
    before = state(copied.parent)
    with pytest.raises(BindingError, match="GS-424") as caught:
        fitting(copied, resume=True)
    assert caught.value.exit_code == 4
    assert "--gamma" in str(caught.value)
    assert state(copied.parent) == before


def test_a_gamma_of_another_run_is_refused(fitting: Fit, copied: Path, tmp_path: Path) -> None:
    stop_after(fitting, tmp_path / "other", 1, replace(CONFIG, train=replace(CONFIG.train, seed=7)))
    shutil.copy(tmp_path / "other.partial" / "gamma.json", copied.with_name("run.partial"))
    with pytest.raises(BindingError, match="GS-424"):
        fitting(copied, resume=True)


def test_a_gamma_that_the_checkpoints_do_not_know_is_refused(copied: Path) -> None:
    checkpoint = newest_checkpoint(copied.with_name("run.partial"))
    assert checkpoint is not None
    gamma = checkpoint.inputs["gamma"]
    check_gamma(Left(checkpoint=checkpoint), gamma, copied)
    check_gamma(Left(), 2 * gamma, copied)
    with pytest.raises(BindingError, match="GS-424"):
        check_gamma(Left(checkpoint=checkpoint), 2 * gamma, copied)


@pytest.mark.parametrize("name", ["ranks.json", "gamma.json"])
def test_a_deleted_file_is_made_anew(fitting: Fit, unbroken: dict[str, object], copied: Path, name: str) -> None:
    """What the messages about an empty file advise."""
    file = copied.with_name("run.partial") / name
    file.write_text("")
    with pytest.raises(InputError, match="GS-319") as caught:
        fitting(copied, resume=True)
    assert caught.value.fields["file"] == file
    assert "delete this file" in str(caught.value.fields["try"])
    file.unlink()
    fitting(copied, resume=True)
    assert content(copied) == unbroken


@pytest.mark.parametrize(
    ("key", "value"),
    [("config", "x"), ("base", "x"), ("base", {"roots": []}), ("data", None), ("eval_data", [1]), ("versions", "x")],
)
def test_a_malformed_run_json_is_refused(fitting: Fit, copied: Path, key: str, value: object) -> None:
    file = copied.with_name("run.partial") / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    before = state(copied.parent)
    with pytest.raises(InputError, match="GS-398") as caught:
        fitting(copied, resume=True)
    assert caught.value.fields["file"] == file
    assert key in caught.value.what
    assert "--overwrite" in str(caught.value)
    assert state(copied.parent) == before


def test_a_partial_folder_without_its_run_json_is_refused(fitting: Fit, copied: Path) -> None:
    (copied.with_name("run.partial") / "run.json").unlink()
    before = state(copied.parent)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="GS-604"):
            fitting(copied, **how)
    assert state(copied.parent) == before


# Settings that only Python has.
NO_OPTION = frozenset({"probe.longest", "init.search_batches", "train.floor", "train.betas"})


def test_what_differs_is_named_with_its_option() -> None:
    options = {name for parameter in cli.commands["fit"].params for name in parameter.opts}
    settings = [name for name in decisive({"config": asdict(FitConfig())}) if "." in name]
    for name in settings:
        with pytest.raises(BindingError, match="GS-420") as caught:
            check_same({}, {"config": {name: "other"}}, Path("run.partial"))
        option = caught.value.what.partition(f"{name} (")[2].rstrip(")")
        assert option in options if name not in NO_OPTION else not option, name
    assert set(settings) >= NO_OPTION


def test_a_run_of_before_columns_goes_on() -> None:
    config = asdict(FitConfig())
    before = {**config, "data": {name: value for name, value in config["data"].items() if name != "columns"}}
    rest = {"base": {"roots": {}}, "data": {"sha256": "x"}, "eval_data": None}
    assert digests({**rest, "config": before}) == digests({**rest, "config": config})
    named = {**config, "data": {**config["data"], "columns": "text=story"}}
    assert digests({**rest, "config": named}) != digests({**rest, "config": config})


def test_many_differences_are_counted() -> None:
    """Of two records without anything in common the first five are named."""
    now = {"config": {f"setting{number}": number for number in range(9)}}
    with pytest.raises(BindingError, match="GS-420") as caught:
        check_same({}, now, Path("run.partial"))
    names = ", ".join(f"setting{number}" for number in range(5))
    assert caught.value.what == f"the unfinished run differs in: {names} and 4 more"
    assert "setting5" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "limit", "file", "status"),
    [("hash", 8192, "statistics.safetensors", "failed"), ("train", 64, "metrics.jsonl", "running")],
)
def test_a_full_disk_keeps_the_run(
    fitting: Fit, unbroken: dict[str, object], tmp_path: Path, stage: str, limit: int, file: str, status: str
) -> None:
    """A limit on the size of files stands in for the disk, from this stage on. The smaller one takes run.json too."""
    run, log = tmp_path / "run", tmp_path / "log"

    def listen(event: Progress) -> None:
        if event.stage == stage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            fitting(run, listen=listen)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert killed_at(0, work, folder=tmp_path, log=log) == 1
    error = log.read_text().rpartition("error[")[2]
    assert error.startswith("GS-505")
    assert file in error
    assert f"the unfinished output is in {tmp_path / 'run.partial'}; --resume" in error
    assert json.loads((tmp_path / "run.partial" / "run.json").read_text())["status"] == status
    fitting(run, resume=True)
    assert content(run) == unbroken
    assert (run / "probe" / "statistics.safetensors").stat().st_mode == (run / "run.json").stat().st_mode


def test_resume_and_overwrite_exclude_each_other(fitting: Fit, copied: Path) -> None:
    before = state(copied.parent)
    with pytest.raises(UsageError, match="GS-211"):
        fitting(copied, resume=True, overwrite=True)
    assert state(copied.parent) == before


def test_checkpoints_that_a_kill_left_in_a_finished_run_are_swept(fitting: Fit, tmp_path: Path) -> None:
    fitting(tmp_path / "run", LORA)
    before = state(tmp_path)
    left = tmp_path / "run" / "checkpoints" / "step-4"
    left.mkdir(parents=True)
    (left / "state.json").write_text("{}")
    with pytest.raises(OutputError, match="GS-601"):
        fitting(tmp_path / "run", LORA)
    assert left.exists()  # nothing was asked of it
    with pytest.raises(OutputError, match="nothing to resume"):
        fitting(tmp_path / "run", LORA, resume=True)
    assert state(tmp_path) == before


def test_a_complete_run_is_not_resumed(fitting: Fit, tmp_path: Path) -> None:
    fitting(tmp_path / "run", LORA)
    before = state(tmp_path)
    with pytest.raises(OutputError, match="GS-601") as caught:
        fitting(tmp_path / "run", LORA, resume=True)
    assert "nothing to resume" in str(caught.value)
    assert state(tmp_path) == before


def test_an_unfinished_run_is_not_touched_without_a_word(fitting: Fit, copied: Path) -> None:
    before = state(copied.parent)
    with pytest.raises(OutputError, match="GS-603") as caught:
        fitting(copied)
    assert "--resume" in str(caught.value)
    assert state(copied.parent) == before


def test_one_of_two_resumers_is_refused(fitting: Fit, copied: Path) -> None:
    with staged_folder(copied, visible=True, resume=True), pytest.raises(OutputError, match="GS-602") as caught:
        fitting(copied, resume=True)
    assert caught.value.exit_code == 6
    assert str(os.getpid()) in caught.value.what


# Signals, and a loss that is not finite


@pytest.mark.parametrize("step", [1, 6])
def test_a_signal_during_training(fitting: Fit, unbroken: dict[str, object], tmp_path: Path, step: int) -> None:
    stopped = stop_after(fitting, tmp_path / "run", step)
    folder = tmp_path / "run.partial"
    assert stopped.exit_code == 143
    assert f"after training step {step} of 6" in str(stopped)
    assert str(folder / "checkpoints" / f"step-{step}") in str(stopped)
    assert "--resume" in str(stopped)
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    fitting(tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == unbroken


def test_the_second_signal_stops_at_once() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping() as stop:
        assert stop() is None
        signal.raise_signal(signal.SIGTERM)
        assert stop() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As SIGINT is for a command in a script's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def nan_from(call: int) -> Callable[..., torch.Tensor]:
    calls = itertools.count(1)
    true_loss = loop.mean_loss

    def loss(model: Any, batch: Any) -> torch.Tensor:
        value = true_loss(model, batch)
        return value * float("nan") if model.training and next(calls) >= call else value

    return loss


def test_a_loss_of_nan_keeps_and_names_the_last_checkpoint(
    fitting: Fit, unbroken: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_loss = loop.mean_loss
    monkeypatch.setattr(loop, "mean_loss", nan_from(6))
    with pytest.raises(RunError, match="GS-702") as caught:
        fitting(tmp_path / "run")
    monkeypatch.setattr(loop, "mean_loss", true_loss)
    assert caught.value.exit_code == 7
    assert "step 6" in caught.value.what
    assert str(tmp_path / "run.partial" / "checkpoints" / "step-4") in str(caught.value.fields["kept"])
    fitting(tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == unbroken


def test_a_loss_of_nan_before_any_checkpoint(fitting: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "mean_loss", nan_from(2))
    with pytest.raises(RunError, match="no checkpoint yet"):
        fitting(tmp_path / "run")


# Several processes


WORKER = """
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch
torch.set_num_threads(1)
from gora_serve.config import *
from gora_serve.errors import Stopped
from gora_serve.training.checkpoint import newest_checkpoint
from gora_serve.training.fit import fit
from gora_serve.training.resume import Left, check_gamma, check_same
stop_at, resume = int(sys.argv[5]), sys.argv[6] == "resume"
config = FitConfig(
    model=ModelConfig(dtype="float32"), data=DataConfig(max_length=96, batch_size=2), probe=ProbeConfig(steps=2),
    ranks=RankConfig(rank=2), init=InitConfig(gamma=0.1), train=TrainConfig(steps=4, lr=1e-3),
)
seen = []
def listen(event):
    if event.stage == "train":
        seen.append(event.done)
def stop():  # the signal comes to the second process only
    return signal.SIGTERM if stop_at in seen and os.environ["RANK"] == "1" else None
try:
    fit(sys.argv[2], sys.argv[3], Path(sys.argv[4]), config, resume=resume, stop=stop, listen=listen)
except Stopped as err:
    sys.exit(err.exit_code)
"""


@pytest.fixture
def two_processes(tiny_gpt2: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., list[int]]:
    """Fit in two processes over a base with dropout; returns their exit codes."""
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.2}))
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)

    def run(output: Path, stop_at: int = 0, how: str = "new") -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [sys.executable, worker, Path(__file__).parents[2], base, tiny_data, output, stop_at, how]
        environment = {
            **os.environ, "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu",
        }  # fmt: skip
        processes = [
            subprocess.Popen(
                [str(word) for word in words],
                env=environment | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            )
            for rank in ("0", "1")
        ]
        try:
            return [process.wait(timeout=180) for process in processes]
        finally:
            for process in processes:
                process.kill()

    return run


@pytest.mark.slow
def test_two_processes_go_on_together(two_processes: Callable[..., list[int]], tmp_path: Path) -> None:
    assert two_processes(tmp_path / "whole") == [0, 0]
    assert two_processes(tmp_path / "run", stop_at=3) == [143, 143]
    checkpoint = json.loads((tmp_path / "run.partial" / "checkpoints" / "step-3" / "state.json").read_text())
    assert len(checkpoint["random"]) == 2
    assert two_processes(tmp_path / "run", how="resume") == [0, 0]
    assert content(tmp_path / "run") == content(tmp_path / "whole")
