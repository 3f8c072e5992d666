"""A base whose weights stay on the CPU or on disk: Accelerate's hooks bring a layer's to the device while it runs.

Gradient checkpointing per block goes with it: autograd then keeps the weights of one block at a time, and fetches
them again for the backward pass. Weights on disk are read straight from the base's own safetensors files.
"""

from __future__ import annotations

import errno
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gora_serve.config import Offload
from gora_serve.errors import InputError, MachineError, UsageError

# Recomputation stops at the last tensor that is needed, before the hook behind it has put the weights away again.
CHECKPOINTING = {"use_reentrant": False, "early_stop": False}


def load_on_disk(load: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return (model, loading info) of transformers' `load`, every weight on disk.

    Weights that transformers has to convert on loading are written to a temporary folder, which lives as long as
    the model. All others are read from the base's files, whenever they are needed. Raises MachineError where that
    folder is full.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gora-serve-offload-"))
        with _quiet("accelerate.big_modeling"), _writing(folder):  # that weights are on disk is no news
            model, loaded = load(device_map={"": "disk"}, offload_folder=folder)
        weakref.finalize(model, stack.pop_all().close)
    return model, loaded


@contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Say in our words that converted weights do not fit into the folder."""
    try:
        yield
    except (SafetensorError, OSError) as err:
        full = "Error while serializing" in str(err) or getattr(err, "errno", None) == errno.ENOSPC
        if not full:
            raise
        raise MachineError(
            "weights that have to be converted cannot be written for --offload disk", code="GS-527", file=folder,
            actual=str(err), hint="set TMPDIR to a folder with as much space as the base takes, or --offload cpu",
        ) from err  # fmt: skip


class _BaseFiles(OffloadedWeightsLoader):  # type: ignore[misc]
    """The weights on disk by name; a file that cannot be read any more is named."""

    def __getitem__(self, key: str) -> Any:
        try:
            return super().__getitem__(key)
        except (RuntimeError, SafetensorError, OSError) as err:  # gone, cut short, or unreadable
            raise MachineError(
                "a weight cannot be read again for --offload disk", code="GS-528", tensor=key,
                file=self.index[key].get("safetensors_file"), actual=str(err),
                hint="another program moved or changed the file; restore the base, then --resume",
            ) from err  # fmt: skip


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def offload(model: nn.Module, where: Offload, device: torch.device) -> None:
    """Let the layers run on `device` with weights fetched from the CPU, or from where `load_on_disk` left them.

    Raises UsageError for a model without gradient checkpointing, without which offloading would save nothing, and
    for one that uses a weight outside of the layer that holds it, and InputError for weights on disk of other shapes.
    """
    from accelerate import cpu_offload

    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            "--offload needs gradient checkpointing, which this model does not have", code="GS-221",
            actual=type(model).__name__, hint="--offload none",
        )  # fmt: skip
    if device.type == "cpu":
        device = torch.device("cpu")  # Accelerate's hooks take cpu:0, the name that several processes have, for another
    if where == "cpu":
        cpu_offload(model, device)
    else:
        _fetch_onto(model, device)
    _check_fetches(model, device)
    model.gradient_checkpointing_enable(CHECKPOINTING)  # type: ignore[operator]


class _NothingAbsent(TorchFunctionMode):
    """While open, an operation on a weight that has not been fetched is an error.

    Torch itself takes such a weight in a matrix product on the CPU, and computes with memory that nobody has written.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = {tensor.is_meta for tensor in _tensors((args, tuple((kwargs or {}).values())))}
        if len(there) == 2:
            raise UsageError(
                "this model uses a weight outside of the layer that holds it: it cannot be offloaded", code="GS-222",
                actual=getattr(func, "__name__", str(func)), hint="--offload none",
            )  # fmt: skip
        return func(*args, **(kwargs or {}))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _check_fetches(model: nn.Module, device: torch.device) -> None:
    """Run a few tokens through the model and see that every weight is there when it is used."""
    tokens = torch.tensor([[1, 2, 3]], device=device)
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = tokens
    try:
        with torch.no_grad(), _NothingAbsent():
            model(**inputs, use_cache=False)
    except ValueError as err:
        if "tensor of shape" not in str(err):  # Accelerate's, of a weight that it fetches from disk
            raise
        raise InputError(
            f"a weight has another shape than {type(model).__name__} has by config.json", code="GS-349",
            actual=str(err), hint="download the base again, or give another folder",
        ) from err  # fmt: skip


def _fetch_onto(model: nn.Module, device: torch.device) -> None:
    """Hook the model anew: transformers lets a model that is wholly on disk run on the CPU."""
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules

    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    loader = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)  # type: ignore[union-attr]
    remove_hook_from_submodules(model)
    weights = _BaseFiles(index=loader.index)
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)
