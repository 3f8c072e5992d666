"""`fit` from end to end on tiny bases: what it writes, what it refuses, and that the base stays as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import LLAMA_PATHS, color_rows, write_jsonl
from transformers import AutoModelForCausalLM

from gora_serve.adapter.format import read_adapter
from gora_serve.config import (
    DataConfig,
    FitConfig,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    TrainConfig,
)
from gora_serve.errors import (
    BindingError,
    InputError,
    MachineError,
    MismatchError,
    OutputError,
    RunError,
    UsageError,
)
from gora_serve.progress import Progress
from gora_serve.training import loop, session, train_stage
from gora_serve.training.data import Example
from gora_serve.training.fit import fit
from gora_serve.training.out_of_memory import naming_memory
from gora_serve.training.probe_run import probe_only
from gora_serve.training.run import FitResult, split_rows

QUICK = FitConfig(
    model=ModelConfig(dtype="float32"),
    data=DataConfig(max_length=96, batch_size=4),
    probe=ProbeConfig(steps=3),
    ranks=RankConfig(rank=4),
    init=InitConfig(gamma=0.1, search_batches=1),
    train=TrainConfig(steps=3, lr=1e-3),
)
LORA = replace(QUICK, train=replace(QUICK.train, method="lora"))
AUTO = replace(QUICK, init=InitConfig(gamma="auto", search_batches=2))


def run(base: Path, data: Path, output: Path, config: FitConfig = QUICK, **options: Any) -> FitResult:
    return fit(str(base), str(data), output, config, **options)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the same task that training does not see."""
    return write_jsonl(tmp_path_factory.mktemp("held-out") / "eval.jsonl", color_rows(60)[40:])


@pytest.fixture(scope="module")
def finished(
    tiny_base: Path, tiny_data: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FitResult, list[Progress]]:
    """One run with γ searched, with evaluation data: most tests look at its folder."""
    output = tmp_path_factory.mktemp("runs") / "run"
    events: list[Progress] = []
    config = replace(AUTO, train=replace(AUTO.train, eval_every=2))
    before = digests(tiny_base)
    result = run(tiny_base, tiny_data, output, config, eval_data=str(held_out), listen=events.append)
    assert digests(tiny_base) == before
    return output, result, events


def test_the_folder_holds_what_it_should_and_nothing_else(finished: Any) -> None:
    output = finished[0]
    assert set(digests(output)) == {
        "run.json", "ranks.json", "gamma.json", "metrics.jsonl", "probe/probe.json", "probe/statistics.safetensors",
        "probe/gora_manifest.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/gora_manifest.json",
    }  # fmt: skip
    assert sorted(path.name for path in output.parent.iterdir()) == ["run"], "no partial folder, lock or stage is left"


def test_run_json(finished: Any, tiny_base: Path, tiny_data: Path, held_out: Path) -> None:
    output, result, _ = finished
    run_json = read(output / "run.json")
    assert run_json["schema"] == "gora-serve/run/1"
    assert run_json["status"] == "complete"
    assert run_json["base"]["name"] == str(tiny_base)
    assert set(run_json["base"]["roots"]) == {"weights", "config", "tokenizer"}
    assert all(root for root in run_json["base"]["roots"].values())
    assert run_json["base_after"] == {"roots": run_json["base"]["roots"], "memory_root": run_json["memory_root"]}
    assert run_json["data"] == {
        "name": "colors.jsonl", "given": str(tiny_data), "sha256": hashlib.sha256(tiny_data.read_bytes()).hexdigest(),
        "rows": 40, "used": 40, "cut": 0, "left_out": 0,
    }  # fmt: skip
    assert run_json["eval_data"]["sha256"] == hashlib.sha256(held_out.read_bytes()).hexdigest()
    assert run_json["config"]["train"]["seed"] == 42
    assert run_json["config"]["ranks"]["rank"] == 4
    assert run_json["versions"]["torch"] == torch.__version__
    assert run_json["processes"] == 1
    assert run_json["result"]["peak_bytes"]["host"] > 2**20
    assert run_json["result"]["peak_bytes"]["device"] is None
    assert run_json["result"]["gamma"] == result.gamma
    assert run_json["result"]["parameters"] == result.adapter.parameters
    stages = run_json["result"]["seconds_by_stage"]
    assert list(stages) == ["probe", "gamma", "train", "evaluate", "verify"]
    assert sum(stages.values()) <= run_json["seconds"]
    assert lines(output / "metrics.jsonl")[-2]["seconds"] <= stages["train"]


def test_ranks_json(finished: Any) -> None:
    output, result, _ = finished
    ranks = read(output / "ranks.json")
    tensors = load_file(output / "adapter" / "adapter_model.safetensors")
    trained = {p: len(tensors[f"base_model.model.{p}.lora_A.weight"]) for p in LLAMA_PATHS}
    sizes = {
        p: tensors[f"base_model.model.{p}.lora_A.weight"].shape[1]
        + tensors[f"base_model.model.{p}.lora_B.weight"].shape[0]
        for p in LLAMA_PATHS
    }
    assert ranks["schema"] == "gora-serve/ranks/1"
    assert (ranks["rule"], ranks["rank"], ranks["rank_min"], ranks["rank_max"]) == ("paper", 4, 2, 16)
    assert ranks["ranks"] == trained == result.adapter.ranks
    assert ranks["parameters"] == sum(rank * sizes[p] for p, rank in trained.items())
    assert ranks["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert ranks["lora_parameters"] == 4 * sum(sizes.values())
    assert len(set(trained.values())) > 1


def test_probe_json_agrees_with_the_paper_rule(finished: Any) -> None:
    """From the written importances, equations 6 to 8 must give the written ranks."""
    output = finished[0]
    probe = read(output / "probe" / "probe.json")
    assert probe["schema"] == "gora-serve/probe/1"
    assert (probe["mode"], probe["steps"], probe["samples"], probe["stopped_early"]) == ("exact", 3, 12, False)
    assert probe["tokens"] > 12 * 10
    assert list(probe["modules"]) == list(LLAMA_PATHS)
    root = {p: np.sqrt(sum(m["shape"])) for p, m in probe["modules"].items()}
    importance = {p: m["importance"] for p, m in probe["modules"].items()}
    budget = sum(root[p] * 4 for p in root)
    expected = {
        p: int(np.clip(np.rint(budget * importance[p] / sum(importance.values()) / root[p]), 2, 16)) for p in root
    }
    assert read(output / "ranks.json")["ranks"] == expected
    tensors = load_file(output / "probe" / "statistics.safetensors")
    assert set(tensors) == {f"{p}.{part}" for p in LLAMA_PATHS for part in ("A", "compressed")}
    assert all(tensors[f"{p}.A"].shape == (16, probe["modules"][p]["shape"][1]) for p in LLAMA_PATHS)


def test_gamma_json(finished: Any) -> None:
    output, result, _ = finished
    gamma = read(output / "gamma.json")
    losses = {entry["gamma"]: float(entry["loss"]) for entry in gamma["tried"]}
    assert gamma["schema"] == "gora-serve/gamma/1"
    assert gamma["rows"] == 8  # two batches of four, and a fifth of 40 rows
    assert gamma["base_loss"] == losses[0.0]
    assert gamma["loss"] == min(losses.values()) < gamma["base_loss"]
    assert losses[gamma["gamma"]] == gamma["loss"]
    assert gamma["gamma"] == result.gamma > 0


def test_metrics(finished: Any) -> None:
    output, result, _ = finished
    metrics = lines(output / "metrics.jsonl")
    steps = [entry for entry in metrics if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert all(set(entry) == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} for entry in steps)
    assert [entry["step"] for entry in metrics if "eval_loss" in entry] == [0, 2, 3]
    assert [entry["eval_loss"] for entry in metrics if "eval_loss" in entry] == [
        result.losses["start"], result.losses["step 2"], result.losses["end"],
    ]  # fmt: skip
    assert metrics[0]["base_eval_loss"] == result.losses["base"]


def test_progress_names_every_stage(finished: Any) -> None:
    stages = list(dict.fromkeys(event.stage for event in finished[2]))
    assert stages == ["hash", "probe", "gamma", "train"]  # and hash again at the end
    assert finished[2][-1].stage == "hash"


def plain_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Loss per completion token, by transformers alone."""
    total = count = 0.0
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(head) + tail])
        with torch.no_grad():
            total += float(model(torch.tensor([head + tail]), labels=labels).loss) * len(tail)
        count += len(tail)
    return total / count


def load_for_serving(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()


def test_the_start_is_better_than_the_base_on_unseen_rows(finished: Any) -> None:
    losses = finished[1].losses
    assert losses["start"] < losses["base"]
    assert losses["end"] < losses["start"]


def test_peft_on_the_untouched_base_gets_the_loss_that_training_ended_with(
    finished: Any, tiny_base: Path, tokenizer: Any
) -> None:
    output, result, _ = finished
    rows = color_rows(60)[40:]
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert plain_loss(base, tokenizer, rows) == pytest.approx(result.losses["base"], rel=1e-5)
    model = load_for_serving(tiny_base, output / "adapter")
    assert plain_loss(model, tokenizer, rows) == pytest.approx(result.losses["end"], rel=1e-5)


def test_the_written_adapter_is_the_result(finished: Any) -> None:
    output, result, _ = finished
    back = read_adapter(output / "adapter")
    assert back.base.roots == result.adapter.base.roots
    assert back.origin == result.adapter.origin
    for path, factors in result.adapter.modules.items():
        assert torch.equal(back.modules[path].A, factors.A)
        assert torch.equal(back.modules[path].B, factors.B)
        assert back.modules[path].scale == pytest.approx(16 / factors.rank**0.5, rel=1e-12)


def test_same_seed_same_bytes_other_seed_other_bytes(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    other = replace(AUTO, train=replace(AUTO.train, seed=7))
    for name, config in (("one", AUTO), ("two", AUTO), ("other", other)):
        run(tiny_base, tiny_data, tmp_path / name, config)
    one, two, third = (digests(tmp_path / name / "adapter") for name in ("one", "two", "other"))
    assert one == two
    assert one["adapter_model.safetensors"] != third["adapter_model.safetensors"]
    for name in ("ranks.json", "gamma.json", "probe/probe.json", "probe/statistics.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_plain_lora(tiny_base: Path, tiny_data: Path, held_out: Path, tmp_path: Path) -> None:
    result = run(tiny_base, tiny_data, tmp_path / "run", LORA, eval_data=str(held_out))
    assert result.losses["start"] == result.losses["base"], "B = 0: the first forward pass is the base's"
    assert result.losses["end"] < result.losses["start"]
    assert result.adapter.ranks == dict.fromkeys(LLAMA_PATHS, 4)
    assert {factors.scale for factors in result.adapter.modules.values()} == {4.0}
    assert result.gamma is None
    assert read(tmp_path / "run" / "ranks.json")["rule"] == "uniform"
    assert not (tmp_path / "run" / "probe").exists()
    config = read(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 16, False)


@pytest.mark.parametrize("config", [QUICK, LORA], ids=["gora", "lora"])
def test_a_ranks_file_is_followed(tiny_base: Path, tiny_data: Path, tmp_path: Path, config: FitConfig) -> None:
    ranks = {LLAMA_PATHS[0]: 30, LLAMA_PATHS[1]: 1, LLAMA_PATHS[2]: 0}
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"schema": "gora-serve/ranks/1", "rank": 4, "ranks": ranks}))
    result = run(tiny_base, tiny_data, tmp_path / "run", config, ranks_file=file)
    assert result.adapter.ranks == {LLAMA_PATHS[0]: 30, LLAMA_PATHS[1]: 1}
    assert {p: r for p, r in read(tmp_path / "run" / "ranks.json")["ranks"].items() if r} == result.adapter.ranks


@pytest.mark.parametrize(
    ("ranks", "error"),
    [({"model.nowhere": 4}, BindingError), ({LLAMA_PATHS[0]: 33}, InputError), ({LLAMA_PATHS[0]: -1}, InputError),
     ({LLAMA_PATHS[0]: 2.5}, InputError), ({LLAMA_PATHS[0]: True}, InputError), ({}, InputError),
     ({LLAMA_PATHS[0]: 0}, InputError), ([4], InputError)],
)  # fmt: skip
def test_a_bad_ranks_file_is_refused_before_anything_is_written(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, ranks: Any, error: type[Exception]
) -> None:
    file = tmp_path / "ranks.json"
    file.write_text(json.dumps({"schema": "gora-serve/ranks/1", "rank": 4, "ranks": ranks}))
    with pytest.raises(error):
        run(tiny_base, tiny_data, tmp_path / "run", ranks_file=file)
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.json"]


def assert_failed(output: Path, code: str) -> None:
    """No output; the unfinished folder says why, and holds no adapter."""
    partial = output.with_name(f"{output.name}.partial")
    assert not output.exists()
    assert not (partial / "adapter").exists()
    assert not list(partial.rglob("adapter_model.safetensors"))
    run_json = read(partial / "run.json")
    assert run_json["status"] == "failed"
    assert run_json["error"]["code"] == code


def test_a_weight_changed_by_one_ulp_is_found(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = train_stage.TrainStage.after_step

    def sabotage(self: Any, model: Any, step: int) -> None:
        if step == 2:
            weight = model.get_submodule("base_model.model.model.norm").weight.data
            weight[5] = torch.nextafter(weight[5], torch.tensor(10.0))
        after_step(self, model, step)

    monkeypatch.setattr(train_stage.TrainStage, "after_step", sabotage)
    with pytest.raises(MismatchError, match="GS-110") as caught:
        run(tiny_base, tiny_data, tmp_path / "run")
    assert caught.value.exit_code == 1
    assert_failed(tmp_path / "run", "GS-110")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_base_file_changed_during_the_run_is_found(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The file is replaced, as a download would: the loaded model still holds the old bytes."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    after_step = train_stage.TrainStage.after_step

    def sabotage(self: Any, model: Any, step: int) -> None:
        if step == 1:
            content = bytearray((base / name).read_bytes())
            if name.endswith("safetensors"):
                content[-1] ^= 1
            else:
                content = bytearray(content.replace(b"<|endoftext|>", b"<|endofbook|>").replace(b'"llama"', b'"llamb"'))
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").replace(base / name)
        after_step(self, model, step)

    monkeypatch.setattr(train_stage.TrainStage, "after_step", sabotage)
    with pytest.raises(MismatchError, match="GS-111"):
        run(base, tiny_data, tmp_path / "run")
    assert_failed(tmp_path / "run", "GS-111")


def nan_from(call: int) -> Callable[..., torch.Tensor]:
    calls = []
    true_loss = loop.mean_loss

    def loss(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        value = true_loss(model, batch)
        return value * float("nan") if len(calls) >= call else value

    return loss


def test_a_loss_of_nan_in_training_keeps_the_partial_run(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "mean_loss", nan_from(2))
    with pytest.raises(RunError, match="GS-702") as caught:
        run(tiny_base, tiny_data, tmp_path / "run")
    assert "step 2" in caught.value.what
    assert_failed(tmp_path / "run", "GS-702")
    assert [entry["step"] for entry in lines(tmp_path / "run.partial" / "metrics.jsonl")] == [1]
    with pytest.raises(OutputError):
        run(tiny_base, tiny_data, tmp_path / "run")


def test_a_base_loss_of_nan_in_the_search_is_a_run_error(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "mean_loss", nan_from(1))  # the probe has its own reference
    with pytest.raises(RunError, match="GS-703"):
        run(tiny_base, tiny_data, tmp_path / "run", AUTO)
    assert_failed(tmp_path / "run", "GS-703")


def test_an_evaluation_of_nan_is_a_run_error(
    tiny_base: Path, tiny_data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "evaluate", lambda *_, **__: float("nan"))
    with pytest.raises(RunError, match="GS-704"):
        run(tiny_base, tiny_data, tmp_path / "run", LORA, eval_data=str(held_out))
    assert_failed(tmp_path / "run", "GS-704")


def test_an_existing_output_is_refused_and_untouched(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "precious").write_text("mine")
    with pytest.raises(OutputError, match="GS-601"):
        run(tiny_base, tiny_data, output)
    assert digests(output) == {"precious": hashlib.sha256(b"mine").hexdigest()}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_output_inside_the_base_is_refused(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    with pytest.raises(UsageError):
        run(base, tiny_data, base / "run")
    assert digests(base) == digests(tiny_base)


def test_more_length_than_positions_is_refused(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="GS-205"):
        run(tiny_base, tiny_data, tmp_path / "run", replace(QUICK, data=DataConfig(max_length=257)))


def test_gradient_checkpointing_gives_the_same_adapter(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    checkpointing = replace(QUICK, train=replace(QUICK.train, gradient_checkpointing=True))
    plain = run(tiny_base, tiny_data, tmp_path / "plain").adapter
    saved = run(tiny_base, tiny_data, tmp_path / "saved", checkpointing).adapter
    assert saved.ranks == plain.ranks
    for path, factors in plain.modules.items():
        expected = factors.delta()
        assert float((saved.modules[path].delta() - expected).norm() / expected.norm()) < 1e-4


def test_gpt2_end_to_end(tiny_gpt2: Path, tiny_data: Path, held_out: Path, tmp_path: Path, tokenizer: Any) -> None:
    before = digests(tiny_gpt2)
    result = run(tiny_gpt2, tiny_data, tmp_path / "run", AUTO, eval_data=str(held_out))
    assert digests(tiny_gpt2) == before
    assert result.losses["end"] < result.losses["base"]
    assert len(result.adapter.modules) == 8
    model = load_for_serving(tiny_gpt2, tmp_path / "run" / "adapter")
    assert plain_loss(model, tokenizer, color_rows(60)[40:]) == pytest.approx(result.losses["end"], rel=1e-5)


def test_targets_by_name(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = replace(QUICK, model=ModelConfig(targets="q_proj,v_proj", dtype="float32"))
    result = run(tiny_base, tiny_data, tmp_path / "run", config)
    assert set(result.adapter.modules) == {p for p in LLAMA_PATHS if p.endswith(("q_proj", "v_proj"))}
    model = load_for_serving(tiny_base, tmp_path / "run" / "adapter")
    assert {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")} == set(result.adapter.modules)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_few_rows_are_enough(tiny_base: Path, tmp_path: Path, count: int) -> None:
    data = write_jsonl(tmp_path / "few.jsonl", color_rows(count))
    result = run(tiny_base, data, tmp_path / "run", AUTO)
    assert len(result.adapter.modules) == len(LLAMA_PATHS)


def test_rows_to_probe_and_to_search_are_apart() -> None:
    rows = tuple(Example([i], [i]) for i in range(40))
    probing, searching = split_rows(rows, AUTO)
    assert len(searching) == 8
    assert not set(map(str, probing)) & set(map(str, searching))
    assert len(probing) + len(searching) == 40
    assert split_rows(rows, QUICK) == (rows, ())


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1.0, 40, 10), (2.0, 40, 20), (0.5, 40, 5), (1.0, 41, 11), (3.0, 2, 3), (5.0, 1, 5), (0.29, 100, 8)],
)
def test_epochs_become_steps(tiny_base: Path, tmp_path: Path, epochs: float, rows: int, steps: int) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", color_rows(rows))
    config = replace(LORA, train=replace(LORA.train, steps=None, epochs=epochs))
    run(tiny_base, data, tmp_path / "run", config)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == steps


@pytest.mark.parametrize(
    ("changes", "rows"), [({"epochs": 999_999.0}, 999_999 * 128), ({"steps": 10**7, "grad_accum": 1000}, 4 * 10**10)]
)
def test_more_rows_than_can_be_drawn_are_refused_before_the_probe(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], rows: int
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", color_rows(128))
    train = replace(QUICK.train, **{"steps": None} | changes)
    with pytest.raises(UsageError, match="GS-201") as caught:
        run(tiny_base, data, tmp_path / "run", replace(QUICK, train=train))
    assert caught.value.fields["actual"] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_probe_of_more_rows_than_can_be_drawn_is_refused(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = replace(QUICK, data=replace(QUICK.data, batch_size=40), probe=ProbeConfig(steps=10**7))
    with pytest.raises(UsageError, match="GS-201") as caught:
        run(tiny_base, tiny_data, tmp_path / "run", config)
    assert caught.value.fields["actual"] == 4 * 10**8


def test_a_device_that_cannot_hold_the_base_is_told_of(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocation is real; the base is too small to fail by itself."""
    monkeypatch.setattr(session, "_place", lambda *_: torch.empty(1 << 50))
    for start in (
        lambda: run(tiny_base, tiny_data, tmp_path / "run"),
        lambda: probe_only(str(tiny_base), str(tiny_data), tmp_path / "probe", QUICK, rank_max=4),
    ):
        with pytest.raises(MachineError, match="GS-526") as caught:
            start()
        assert "can't allocate memory" in str(caught.value.fields["actual"])
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), naming_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(MachineError, match="GS-526"), naming_memory():
        raise MemoryError
