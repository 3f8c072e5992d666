"""Several processes, started by `accelerate launch` on CPUs over gloo: they make the run that one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import color_rows, write_jsonl

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
from gora_serve.errors import UsageError
from gora_serve.training.fit import FitResult, fit
from gora_serve.training.processes import make_accelerator
from gora_serve.training.sharding import check_sharding

TIMEOUT = 240
PLAIN = ("--multi_gpu",)
FSDP = ("--use_fsdp", "--fsdp_version", "2")
ON_CPUS = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(*words: object, ways: tuple[str, ...] = PLAIN, env: Mapping[str, str] = ON_CPUS) -> Any:
    """Start two processes by the command of the README."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *ways, "--num_processes", "2",
        "--main_process_port", "0", *map(str, words),
    ]  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    path = str(Path(__file__).parents[2])
    return subprocess.run(
        command, env={**kept, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows to evaluate on: three batches, which two processes cannot share evenly."""
    return write_jsonl(tmp_path_factory.mktemp("eval") / "few.jsonl", color_rows(9))


@pytest.fixture(scope="module")
def alone(
    tiny_base: Path, tiny_data: Path, few_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FitResult]:
    """One process, which takes two micro-batches where two processes take one each."""
    config = FitConfig(
        model=ModelConfig(dtype="float32"),
        data=DataConfig(max_length=96, batch_size=4),
        probe=ProbeConfig(steps=4),
        ranks=RankConfig(rank=4),
        init=InitConfig(gamma="auto"),
        train=TrainConfig(steps=2, lr=1e-3, grad_accum=2),
    )
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, fit(str(tiny_base), str(tiny_data), output, config, eval_data=str(few_rows))


@pytest.mark.parametrize(
    ("ways", "options"),
    [(PLAIN, ()), (PLAIN, ("--offload", "disk")), (FSDP, ("--gradient-checkpointing",))],
    ids=["replicated", "offloaded", "sharded"],
)
def test_two_processes_make_the_run_of_one(
    tiny_base: Path, tiny_data: Path, few_rows: Path, alone: Any, tmp_path: Path, ways: Any, options: Any
) -> None:
    together = tmp_path / "together"
    done = launch(
        "-m", "gora_serve", "fit", tiny_base, "--data", tiny_data, "--eval-data", few_rows, "--output", together,
        "--dtype", "float32", "--max-length", "96", "--batch-size", "4", "--probe-steps", "4", "--rank", "4",
        "--steps", "2", "--lr", "1e-3", *options, ways=ways,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1, "the main process alone speaks"
    assert [path.name for path in tmp_path.iterdir()] == ["together"]
    output, result = alone
    run, expected = (json.loads((folder / "run.json").read_text()) for folder in (together, output))
    assert (run["status"], run["processes"], expected["processes"]) == ("complete", 2, 1)
    assert run["memory_root"] == run["base_after"]["memory_root"] == expected["memory_root"]
    assert json.loads((together / "ranks.json").read_text()) == json.loads((output / "ranks.json").read_text())
    assert run["result"]["gamma"] == pytest.approx(result.gamma, rel=1e-6)
    assert run["result"]["losses"] == pytest.approx(dict(result.losses), rel=1e-5)
    steps = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    found = read_adapter(together / "adapter")
    for path, factors in result.adapter.modules.items():
        whole = factors.delta()
        assert float((found.modules[path].delta() - whole).norm() / whole.norm()) < 1e-4, path


WORKER = """
import json, sys
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from gora_serve.config import DataConfig, ModelConfig, TrainConfig
from gora_serve.progress import silent
from gora_serve.training.processes import average_gradients, share_start
from gora_serve.training.session import open_session
from gora_serve.training.weights import memory_root, weight_matrix

session = open_session(
    sys.argv[1], sys.argv[2], model=ModelConfig(), rows=DataConfig(max_length=96), train=TrainConfig(), listen=silent
)
rank = session.accelerator.process_index
parameters = dict(session.model.named_parameters())
sizes = {
    name: [p.numel(), p.to_local().numel() if isinstance(p, DTensor) else p.numel()] for name, p in parameters.items()
}
sums = {path: weight_matrix(module).double().sum().item() for path, module in session.modules.items()}

both, first, none = (nn.Parameter(torch.full((2, 3), float(10 * rank + i))) for i in range(3))
share_start([both, first, none], session.accelerator)
both.grad = torch.full((2, 3), 1.0 + 2 * rank)
if rank == 0:
    first.grad = torch.ones(2, 3)
average_gradients([both, first, none], session.accelerator)
grads = [None if p.grad is None else p.grad.tolist() for p in (both, first, none)]
starts = [p.detach().flatten().tolist() for p in (both, first, none)]
answer = {"sizes": sizes, "sums": sums, "root": memory_root(session.model), "grads": grads, "starts": starts}
with open(f"{sys.argv[3]}-{rank}", "w") as file:
    json.dump(answer, file)
"""


def test_what_each_process_holds_and_what_travels(tiny_base: Path, tiny_data: Path, alone: Any, tmp_path: Path) -> None:
    """Sharded: half of every weight on each; whole matrices on demand. Gradients: means; starts: the main one's."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = launch(worker, tiny_base, tiny_data, tmp_path / "answer", ways=FSDP)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"answer-{rank}").read_text()) for rank in (0, 1))
    assert all(0 < local == whole / 2 for whole, local in first["sizes"].values())
    assert first["sums"] == second["sums"]
    from safetensors.torch import load_file

    files = [load_file(path) for path in tiny_base.glob("*.safetensors")]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    assert first["sums"] == {path: float(stored[f"{path}.weight"].double().sum()) for path in first["sums"]}
    assert first["root"] == second["root"] == json.loads((alone[0] / "run.json").read_text())["memory_root"]
    row = [[2.0] * 3] * 2
    half = [[0.5] * 3] * 2
    assert first["grads"] == second["grads"] == [row, half, None]
    assert first["starts"] == second["starts"] == [[0.0] * 6, [1.0] * 6, [2.0] * 6]


def test_processes_that_do_not_find_each_other_are_refused(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Without a GPU and without ACCELERATE_USE_CPU each process believes that it is alone."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the processes find each other")
    done = launch(
        "-m", "gora_serve", "fit", tiny_base, "--data", tiny_data, "--output", tmp_path / "run",
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error[GS-226]") >= 1
    assert not list(tmp_path.iterdir())


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="GS-225"):
        make_accelerator(TrainConfig())


def test_each_run_of_a_process_has_its_own_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate by itself keeps the state of the first one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def autocast_of(precision: Any) -> tuple[str, torch.dtype]:
        accelerator = make_accelerator(TrainConfig(mixed_precision=precision))
        with accelerator.autocast():
            return accelerator.mixed_precision, torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype

    plain, bf16 = ("no", torch.float32), ("bf16", torch.bfloat16)
    assert [autocast_of(one) for one in ("bf16", None, "bf16", "no")] == [bf16, plain, bf16, plain]
    with pytest.raises(UsageError, match="GS-204"):
        autocast_of("half")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert [autocast_of(one) for one in (None, "no")] == [bf16, plain]


@dataclass(frozen=True)
class Launch:
    """A launch that cannot be: FSDP of the first version, or together with what it cannot shard."""

    version: str
    model: ModelConfig
    code: str


@pytest.mark.parametrize(
    "wrong",
    [
        Launch("1", ModelConfig(), "GS-224"),
        Launch("2", ModelConfig(offload="disk"), "GS-223"),
        Launch("2", ModelConfig(quantize="nf4"), "GS-228"),
    ],
    ids=["version-1", "offload", "quantize"],
)
def test_fsdp_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch, wrong: Launch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", wrong.version)
    with pytest.raises(UsageError, match=wrong.code):
        check_sharding(SimpleNamespace(num_processes=2), wrong.model)
    check_sharding(SimpleNamespace(num_processes=1), wrong.model)  # nothing to spread over
