"""Checkpoints of training: everything that the next step depends on, as safetensors and JSON. No pickle.

A checkpoint is a sealed folder, `checkpoints/step-N`, that appears whole. What it holds is in docs/formats.md.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gora_serve.errors import BindingError, GoraError, InputError
from gora_serve.integrity.binding import check_folder, seal_folder
from gora_serve.integrity.files import staged_folder, write_bytes, write_json
from gora_serve.training.loop import Position
from gora_serve.training.run_files import RUN_SCHEMA, read_object

log = logging.getLogger(__name__)

SCHEMA = "gora-serve/checkpoint/1"
FOLDER = "checkpoints"
KEPT = 2  # how many checkpoints a run keeps
STATE, TENSORS = "state.json", "state.safetensors"
PARAMETER = "parameter"


@dataclass(frozen=True)
class Checkpoint:
    """Training after `position.step` steps.

    tensors: `capture`. random: the generators of every process. scaler: of fp16, empty without. losses: measured so
    far, and evaluating: the seconds that took. inputs: digests of what the run is made from.
    """

    position: Position
    tensors: Mapping[str, Tensor]
    random: Sequence[Mapping[str, Any]]
    scaler: Mapping[str, Any]
    losses: Mapping[str, float]
    inputs: Mapping[str, Any]
    evaluating: float = 0.0


def capture(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the trainable parameters and the optimizer's state of each, on the CPU, copied.

    Keys: parameter.<name>, and for each tensor of the optimizer's state <kind>.<name>.
    """
    tensors = {}
    for name, parameter in _trainable(model):
        tensors[f"{PARAMETER}.{name}"] = _copied(parameter)
        for kind, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"the optimizer's {kind} is no tensor"
            tensors[f"{kind}.{name}"] = _copied(value)
    return tensors


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def restore(model: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put the model's trainable parameters and the optimizer's state back, in place, on the devices they are on.

    Learning rates and other settings stay the optimizer's own. Raises BindingError where `tensors` are those of
    other parameters.
    """
    names = dict(_trainable(model))
    _check_names(names, tensors)
    order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == PARAMETER:
            with torch.no_grad():
                names[name].copy_(tensor)
        else:
            state.setdefault(order.index(id(names[name])), {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_names(names: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    ours = {f"{PARAMETER}.{name}": tuple(parameter.shape) for name, parameter in names.items()}
    theirs = {key: tuple(t.shape) for key, t in tensors.items() if key.startswith(f"{PARAMETER}.")}
    known = all(key.partition(".")[2] in names for key in tensors)
    if ours != theirs or not known:
        odd = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise BindingError(
            "the checkpoint holds other parameters than this run has", code="GS-421",
            tensor=odd[0] if odd else None, expected=ours.get(odd[0]) if odd else None,
            actual=theirs.get(odd[0]) if odd else None, hint="start anew with --overwrite, without --resume",
        )  # fmt: skip


def step_folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step}"


def steps_of(run: Path) -> list[int]:
    """Return the steps that the run has a checkpoint of, complete or not, from the newest back."""
    places = (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else ()
    return sorted((step for path in places if (step := _step_of(path)) is not None), reverse=True)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-([1-9][0-9]*)", path.name)
    return int(match[1]) if match and path.is_dir() and not path.is_symlink() else None


def check_entries(run: Path) -> None:
    """Raise InputError (GS-399) where something that is no checkpoint stands where one is, or will be, written."""
    folder = run / FOLDER
    odd = [folder] if folder.is_symlink() or (folder.exists() and not folder.is_dir()) else []
    if folder.is_dir():
        odd += [path for path in sorted(folder.iterdir()) if path.name[0] != "." and _step_of(path) is None]
    if odd:
        raise InputError(
            "this is no checkpoint of ours", code="GS-399", file=odd[0], kept="nothing was changed",
            expected="a folder step-N in the folder checkpoints", hint="move it away, then --resume again",
        )  # fmt: skip


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into the run's folder, whole or not at all, then delete all but the newest two."""
    position = checkpoint.position
    target = step_folder(run, position.step)
    with staged_folder(target, overwrite=True) as stage:
        write_bytes(stage / TENSORS, save(dict(checkpoint.tensors)))
        state = {
            "schema": SCHEMA,
            "step": position.step,
            "tokens": position.tokens,
            "seconds": position.seconds,
            "losses": dict(checkpoint.losses),
            "evaluating": checkpoint.evaluating,
            "inputs": dict(checkpoint.inputs),
            "scaler": dict(checkpoint.scaler),
            "random": [dict(one) for one in checkpoint.random],
        }
        write_json(stage / STATE, state)
        seal_folder(stage, {"step": position.step})
    for step in steps_of(run)[KEPT:]:
        shutil.rmtree(step_folder(run, step))
    return target


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, checked against its seal. Raises GoraError for one that is not as it was written."""
    check_folder(folder)
    state = read_object(folder / STATE, SCHEMA)
    position = Position(state["step"], state["tokens"], state["seconds"])
    tensors = load_file(folder / TENSORS)
    evaluating = state.get("evaluating", 0.0)  # a run of an older version has none
    return Checkpoint(
        position, tensors, state["random"], state["scaler"], state["losses"], state["inputs"], evaluating
    )  # fmt: skip


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is complete, or None. A damaged one is passed over with a warning.

    Raises InputError as `check_entries`.
    """
    check_entries(run)
    for step in steps_of(run):
        folder = step_folder(run, step)
        try:
            return read_checkpoint(folder)
        except GoraError as err:
            where = err.fields.get("file", folder)
            log.warning("%s is damaged (%s: %s); going back to the checkpoint before it", folder, where, err.what)
    return None


def discard_all(run: Path) -> None:
    """Delete all checkpoints of a finished run: they are of use to an unfinished one only."""
    try:
        shutil.rmtree(run / FOLDER)
    except OSError as err:
        log.warning("the run is in place, but its checkpoints cannot be removed from %s: %s", run, err.strerror)


def sweep_finished(run: Path) -> None:
    """Delete the checkpoints that a process left in its finished run, as it was killed between publishing and this."""
    if not (run / FOLDER).is_dir() or (run / FOLDER).is_symlink() or not (run / "run.json").is_file():
        return
    if read_object(run / "run.json", RUN_SCHEMA).get("status") == "complete":
        discard_all(run)


def discard_after(run: Path, step: int) -> None:
    """Delete the checkpoints after `step`: damaged ones, which must not push out whole ones."""
    for later in steps_of(run):
        if later > step:
            shutil.rmtree(step_folder(run, later))
