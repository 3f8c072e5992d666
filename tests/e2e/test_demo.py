"""The main job on the real model: what `gora-serve demo` claims is checked by other means."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gora_serve.config import DataConfig, FitConfig, ModelConfig, ProbeConfig, RankConfig
from gora_serve.training.run_files import read_probe

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def test_the_base_fails_and_the_adapters_solve(demo_run: tuple[Path, dict[str, Any]]) -> None:
    result = demo_run[1]
    for task, score in result["exact_match"].items():
        assert score["before"] <= 0.25, task
        assert score["after"] >= score["before"] + 0.5, task


def test_answers_are_counted_as_a_reader_would(demo_run: tuple[Path, dict[str, Any]]) -> None:
    """Exact match again from the printed answers and the rows of the data files."""
    result = demo_run[1]
    for task in ("banking", "requests"):
        answers = [answer for answer in result["answers"] if answer["task"] == task]
        rows = [json.loads(line) for line in (EXAMPLES / task / "test.jsonl").read_text().splitlines()[: len(answers)]]
        train = (EXAMPLES / task / "train.jsonl").read_text()
        right = 0
        for answer, row in zip(answers, rows, strict=True):
            assert answer["prompt"] == row["prompt"]
            assert json.dumps(row["prompt"], ensure_ascii=False) not in train  # unseen
            assert set(answer["answers"]) == {"base", "banking", "requests"}
            right += answer["answers"][task] == row["completion"]
        assert result["exact_match"][task]["after"] == right / len(rows)


def test_base_files_are_those_of_the_manifest(demo: Path) -> None:
    """sha256sum, not our code, says that no file of the base changed."""
    manifest = json.loads((demo / "base-manifest.json").read_text())
    lines = "".join(f"{file['sha256']}  {file['path']}\n" for file in manifest["files"])
    done = subprocess.run(["sha256sum", "--check", "--quiet"], input=lines, text=True, cwd=demo / "base", check=False)
    assert done.returncode == 0
    assert any(file["path"] == "model.safetensors" for file in manifest["files"])


def test_runs_record_the_same_base_before_and_after(demo: Path) -> None:
    manifest = json.loads((demo / "base-manifest.json").read_text())
    for task in ("banking", "requests"):
        run = json.loads((demo / "runs" / task / "run.json").read_text())
        assert run["status"] == "complete"
        assert run["base"]["roots"]["weights"] == manifest["weights_root"]
        gamma = json.loads((demo / "runs" / task / "gamma.json").read_text())
        assert gamma["loss"] < gamma["base_loss"]


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' RMSNorm goes through float32 whatever its input is."""
    import torch

    def norm(module: Any, x: Any) -> Any:
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

    model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(norm, module)
    return model


def test_every_form_gives_the_logits_of_the_trained_adapter(
    demo: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """PEFT loads each form without a warning; its logits are those of W + delta, added to the weights here.

    In float64, so that what differs is the adapter and not the order of float32 sums.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from gora_serve.adapter.format import read_adapter
    from gora_serve.config import ExportConfig
    from gora_serve.training.export import export

    run = demo / "runs" / "requests"
    tokens = torch.arange(100, 164).reshape(2, 32)
    reference = AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float64)
    with torch.no_grad():
        for path, factors in read_adapter(run / "adapter").modules.items():
            weight = reference.get_submodule(path).weight
            weight += factors.delta()
        expected = in_float64(reference)(tokens).logits
    del reference
    for form in ("unit", "padded", "native"):
        folder = export(run, tmp_path / form, ExportConfig(form)).folder  # type: ignore[arg-type]
        base = AutoModelForCausalLM.from_pretrained(demo / "base", dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = PeftModel.from_pretrained(base, folder)
        with torch.no_grad():
            difference = float((in_float64(model)(tokens).logits - expected).abs().max())
        record_property(form, difference)
        assert difference < 1e-5, form


def test_v_proj_gets_the_highest_mean_rank_and_q_proj_the_lowest(
    smollm2: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The paper's figure 3a, on 64 rows of GSM8K: among attention modules, v_proj first and q_proj last."""
    from gora_serve.gora.ranks import allocate_ranks
    from gora_serve.training.probe_run import probe_only

    config = FitConfig(
        model=ModelConfig(targets="attention", dtype="float32"),
        data=DataConfig(batch_size=4),
        probe=ProbeConfig(steps=16),
    )
    rows = EXAMPLES / "gsm8k" / "train.jsonl"
    statistics = probe_only(str(smollm2), str(rows), tmp_path / "probe", config, rank_max=32)
    assert statistics.samples == 64
    probe = read_probe(tmp_path / "probe")
    plan = allocate_ranks(statistics.importances("sensitivity"), statistics.shapes, RankConfig(rank=8))
    assert set(probe["modules"]) == set(plan.ranks)
    kinds: dict[str, list[int]] = {}
    for path, rank in plan.ranks.items():
        kinds.setdefault(path.rsplit(".", 1)[-1], []).append(rank)
    means = {kind: sum(ranks) / len(ranks) for kind, ranks in kinds.items()}
    record_property("mean ranks", means)
    assert max(means, key=lambda kind: means[kind]) == "v_proj", means
    assert min(means, key=lambda kind: means[kind]) == "q_proj", means
