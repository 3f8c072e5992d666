"""Checkpoints: what was captured is what is restored, on disk without a pickle, whole or not at all."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from gora_serve.config import TrainConfig
from gora_serve.errors import BindingError, InputError, MismatchError
from gora_serve.training import checkpoint as checkpoints
from gora_serve.training.checkpoint import (
    Checkpoint,
    capture,
    discard_after,
    newest_checkpoint,
    read_checkpoint,
    restore,
    steps_of,
    write_checkpoint,
)
from gora_serve.training.loop import Position
from gora_serve.training.randomness import random_state, set_random_state

CPU = torch.device("cpu")


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Two groups in an order that is not the model's."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": trainable[1:], "lr": 0.01}, {"params": trainable[:1], "lr": 0.1}])


def take_steps(model: nn.Module, optimizer: Any, count: int) -> list[float]:
    """Train on noise, so that data and dropout depend on the generators. Returns the losses."""
    losses = []
    for _ in range(count):
        loss = model(torch.randn(7, 6) + random.random() + float(np.random.rand())).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def made(step: int, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "random": [random_state(CPU)], "scaler": {}, "losses": {"start": 1 / 3}, "inputs": {"data": "ab"},
        "evaluating": 0.5,
    } | fields  # fmt: skip
    return Checkpoint(Position(step, 10 * step, 0.1 * step), tensors or {"parameter.a": torch.ones(2)}, **values)


@pytest.mark.parametrize("prepared", [False, True], ids=["torch", "accelerate"])
def test_restored_training_is_the_training_that_was_captured(tmp_path: Path, prepared: bool) -> None:
    """Against plain torch: two steps, a copy of all in memory, three more steps; the same three from the files."""
    model = small_model()
    optimizer: Any = adamw(model)
    take_steps(model, optimizer, 2)
    kept = made(2, capture(model, optimizer))
    losses = take_steps(model, optimizer, 3)
    write_checkpoint(tmp_path, kept)

    other = small_model(seed=1)
    other[0].load_state_dict(model[0].state_dict())  # the frozen base
    fresh: Any = Accelerator(cpu=True).prepare_optimizer(adamw(other)) if prepared else adamw(other)
    take_steps(other, fresh, 1)  # a state of its own, which must leave no trace
    back = read_checkpoint(tmp_path / "checkpoints" / "step-2")
    assert (back.position, back.evaluating) == (kept.position, 0.5)
    restore(other, fresh, back.tensors)
    set_random_state(back.random[0], CPU)
    assert take_steps(other, fresh, 3) == losses
    for name, expected in parameters(model).items():
        assert torch.equal(parameters(other)[name], expected), name
    assert [group["lr"] for group in fresh.param_groups] == [0.01, 0.1]


def test_restoring_before_the_first_step_empties_the_optimizer() -> None:
    model = small_model()
    optimizer = adamw(model)
    tensors = capture(model, optimizer)
    assert set(tensors) == {"parameter.2.weight", "parameter.3.weight", "parameter.3.bias"}
    take_steps(model, optimizer, 1)
    restore(model, optimizer, tensors)
    assert not optimizer.state


def test_captured_tensors_do_not_change_with_the_model() -> None:
    model = small_model()
    optimizer = adamw(model)
    take_steps(model, optimizer, 1)
    tensors = capture(model, optimizer)
    before = copy.deepcopy(tensors)
    take_steps(model, optimizer, 1)
    assert all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize("change", ["missing", "shape", "unknown", "moment"])
def test_tensors_of_other_parameters_are_refused(change: str) -> None:
    model = small_model()
    optimizer = adamw(model)
    take_steps(model, optimizer, 1)
    tensors = capture(model, optimizer)
    before = parameters(model)
    if change == "missing":
        del tensors["parameter.3.bias"]
    elif change == "shape":
        tensors["parameter.3.bias"] = torch.zeros(1, 3)
    elif change == "unknown":
        tensors["parameter.5.bias"] = torch.zeros(3)
    else:
        tensors["exp_avg.5.bias"] = torch.zeros(3)
    with pytest.raises(BindingError, match="GS-421"):
        restore(model, optimizer, tensors)
    assert all(torch.equal(parameters(model)[name], before[name]) for name in before)


def test_random_generators_go_on_where_they_were() -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    random.gauss(0, 1)  # each keeps the second of a pair
    np.random.normal()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), float(torch.randn(()))]

    state = json.loads(json.dumps(random_state(CPU)))
    expected = [draw(), draw()]
    set_random_state(state, CPU)
    assert [draw(), draw()] == expected
    assert state["cuda"] is None


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    model = small_model()
    optimizer = adamw(model)
    take_steps(model, optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict()
    folder = write_checkpoint(tmp_path, made(2, capture(model, optimizer), scaler=scaler))
    assert {path.name for path in folder.iterdir()} == {"state.json", "state.safetensors", "gora_manifest.json"}
    state = json.loads((folder / "state.json").read_text())
    assert (state["schema"], state["step"], state["tokens"]) == ("gora-serve/checkpoint/1", 2, 20)
    assert state["losses"] == {"start": 1 / 3}
    assert torch.amp.GradScaler("cpu").state_dict().keys() == state["scaler"].keys()
    assert state["scaler"]["scale"] == 1024.0
    tensors = load_file(folder / "state.safetensors")
    assert torch.equal(tensors["step.3.bias"], torch.tensor(2.0))
    assert torch.equal(tensors["exp_avg.3.bias"], optimizer.state[model[3].bias]["exp_avg"])
    assert torch.equal(tensors["parameter.2.weight"], model[2].weight)
    back = read_checkpoint(folder)
    assert (back.position, back.scaler, back.inputs) == (Position(2, 20, 0.2), scaler, {"data": "ab"})


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        write_checkpoint(tmp_path, made(step))
    assert steps_of(tmp_path) == [100, 10]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.position.step == 100


def test_a_folder_without_its_seal_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, made(1))
    torn = shutil.copytree(tmp_path / "checkpoints" / "step-1", tmp_path / "checkpoints" / "step-2")
    (torn / "gora_manifest.json").unlink()
    (tmp_path / "checkpoints" / ".step-3.gora-1-00000000.tmp").mkdir()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.position.step == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(torn) in caplog.text
    discard_after(tmp_path, 1)
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("name", ["step-0008", "step-0", "step-x", "step-6", "step-7", "thesis.tex"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, made(1)).parent
    if name == "step-6":
        (folder / name).write_text("a file")
    elif name == "step-7":
        (folder / name).symlink_to(folder / "step-1")
    else:
        (folder / name).mkdir()
    with pytest.raises(InputError, match="GS-399") as caught:
        newest_checkpoint(tmp_path)
    assert caught.value.fields["file"] == folder / name
    assert steps_of(tmp_path) == [1]


def test_a_file_where_checkpoints_belong_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(InputError, match="GS-399"):
        newest_checkpoint(tmp_path)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, made(1))
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "state.safetensors").write_bytes(data)
    with pytest.raises(MismatchError):
        read_checkpoint(folder)
    assert newest_checkpoint(tmp_path) is None


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert steps_of(tmp_path) == []


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, made(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "seal_folder", full)
    with pytest.raises(Exception, match="GS-505"):
        write_checkpoint(tmp_path, made(2))
    assert steps_of(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(None, 6, [1, 2, 3, 4, 5, 6]), (None, 24, [3, 6, 9, 12, 15, 18, 21, 24]), (None, 11, [2, 4, 6, 8, 10, 11]),
     (5, 12, [5, 10, 12]), (100, 12, [12]), (None, 1, [1])],
)  # fmt: skip
def test_when_checkpoints_are_due(every: int | None, steps: int, expected: list[int]) -> None:
    config = TrainConfig(save_every=every)
    assert [step for step in range(1, steps + 1) if config.saves_at(step, steps)] == expected
