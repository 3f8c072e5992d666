"""Runs to report on: small real ones, and copies of them that were edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reading import HOSTILE
from tiny_models import color_rows, write_jsonl

from gora_serve.config import DataConfig, FitConfig, InitConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.training.fit import fit

Edit = Callable[[Path], None]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    """A folder with the runs gora (gamma searched, evaluated), lora (evaluated) and short (one step, nothing else)."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = write_jsonl(folder / "held out.jsonl", color_rows(6))

    def make(name: str, train: TrainConfig, gamma: Any = "auto", evaluated: bool = True) -> None:
        config = FitConfig(
            ModelConfig(dtype="float32"), DataConfig(max_length=96, batch_size=4), ProbeConfig(steps=2), RankConfig(4),
            InitConfig(gamma=gamma), train,
        )  # fmt: skip
        fit(str(tiny_base), str(tiny_data), folder / name, config, eval_data=str(held_out) if evaluated else None)

    make("gora", TrainConfig(steps=6, lr=4e-4, eval_every=2, max_grad_norm=1.0))
    make("lora", TrainConfig(method="lora", steps=6, lr=2e-3, eval_every=2))
    make("short", TrainConfig(steps=1), gamma=0.1, evaluated=False)
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy a run under another name, then change values of its JSON files: copied("gora", "name", run=edit)."""

    def copy(source: str, name: str = "copy", *, run: Any = None, ranks: Any = None, gamma: Any = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(runs / source, folder)
        for file, edit in (("run.json", run), ("ranks.json", ranks), ("gamma.json", gamma)):
            if edit is not None:
                value = json.loads((folder / file).read_text())
                edit(value)
                (folder / file).write_text(json.dumps(value))
        return folder

    return copy


@pytest.fixture
def unfinished(runs: Path, tmp_path: Path) -> Path:
    """A run that failed in training: RUN.partial with an error, a torn last line, losses that are not finite."""
    folder = tmp_path / "failed.partial"
    shutil.copytree(runs / "gora", folder, ignore=shutil.ignore_patterns("adapter"))
    value = json.loads((folder / "run.json").read_text())
    value |= {"status": "failed", "error": {"code": "GS-701", "what": "the loss is not finite"}}
    del value["result"], value["base_after"]
    (folder / "run.json").write_text(json.dumps(value))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lost = json.dumps({"step": 7, "loss": None, "lr": 1e-4, "grad_norm": None, "tokens": 999, "seconds": 9.0})
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lost, '{"step": 8, "lo']))
    return folder


@pytest.fixture
def deep(runs: Path, tmp_path: Path) -> Path:
    """A run of a hundred layers that was stopped before its adapter was written."""
    folder = tmp_path / "deep.partial"
    shutil.copytree(runs / "gora", folder, ignore=shutil.ignore_patterns("adapter"))
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.a_projection_with_a_very_long_name", "mlp.down_proj")
    paths = [f"model.layers.{layer}.{kind}" for layer in range(100) for kind in kinds]
    ranks = json.loads((folder / "ranks.json").read_text())
    ranks["ranks"] = {path: 4 + index * 7 % 29 for index, path in enumerate(paths)}
    (folder / "ranks.json").write_text(json.dumps(ranks))
    probe = json.loads((folder / "probe" / "probe.json").read_text())
    probe["modules"] = {path: {"shape": [4096, 1024], "importance": 1.0, "gradient_norm": 1.0} for path in paths}
    (folder / "probe" / "probe.json").write_text(json.dumps(probe))
    rows = [json.dumps({"step": n, "loss": 9 / n, "tokens": 64 * n, "seconds": 0.5 * n}) for n in range(1, 5001)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def hostile(copied: Callable[..., Path], tmp_path: Path) -> Path:
    """A run in which every text that a page could show is markup; so is its name."""

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(one) for key, one in value.items()}
        return HOSTILE if isinstance(value, str) else value

    def run(value: dict[str, Any]) -> None:
        kept = {key: value[key] for key in ("schema", "status")}
        value.update(poison(value) | kept | {"versions": {HOSTILE: HOSTILE}})
        value["config"] |= {HOSTILE: {HOSTILE: HOSTILE}}

    def ranks(value: dict[str, Any]) -> None:
        value["ranks"] = {
            f"{HOSTILE}.{index}.{path}": rank for index, (path, rank) in enumerate(value["ranks"].items())
        }

    return copied("gora", "<script>alert(1)<", run=run, ranks=ranks)
