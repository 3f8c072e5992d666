"""`--track`: TensorBoard's own reader finds the numbers of metrics.jsonl; a missing package is said before any work."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from gora_serve.config import DataConfig, FitConfig, InitConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.errors import MachineError
from gora_serve.training.fit import fit
from gora_serve.training.tracking import check_tracking


def config(train: TrainConfig) -> FitConfig:
    return FitConfig(
        ModelConfig(dtype="float32"), DataConfig(max_length=96, batch_size=4), ProbeConfig(steps=1), RankConfig(2),
        InitConfig(gamma=0.1), train,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_numbers_of_the_metrics(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = TrainConfig(steps=3, track="tensorboard")
    fit(str(tiny_base), str(tiny_data), tmp_path / "run", config(train), eval_data=str(tiny_data))
    events = EventAccumulator(str(tmp_path / "run" / "tracking"))
    events.Reload()
    wanted: dict[str, list[tuple[int, float]]] = {}
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in line.keys() - {"step"}:
            wanted.setdefault(name, []).append((line["step"], pytest.approx(line[name], rel=1e-6)))
    found = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == wanted
    assert {"loss", "eval_loss", "base_eval_loss", "lr"} <= found.keys()


def test_a_missing_package_is_said_before_any_work(tiny_data: Path, tmp_path: Path) -> None:
    missing = next((name for name in ("wandb", "tensorboard") if find_spec(name) is None), None)
    if missing is None:
        pytest.skip("both packages are installed")
    train = TrainConfig(track=missing)  # type: ignore[arg-type]
    with pytest.raises(MachineError) as caught:
        fit("/no/base", str(tiny_data), tmp_path / "run", config(train))
    assert caught.value.code == "GS-559"
    assert list(tmp_path.iterdir()) == []
    check_tracking("none")
