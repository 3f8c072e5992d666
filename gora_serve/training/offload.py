"""A base whose weights stay on the CPU or on disk: Accelerate's hooks bring a layer's to the device while it runs.

Gradient checkpointing per block goes with it: autograd then keeps the weights of one block at a time, and fetches
them again for the backward pass. Weights on disk are read straight from the base's own safetensors files.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gora_serve.config import Offload
from gora_serve.errors import UsageError

# Recomputation stops at the last tensor that is needed, before the hook behind it has put the weights away again.
CHECKPOINTING = {"use_reentrant": False, "early_stop": False}


def load_on_disk(load: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return (model, loading info) of transformers' `load`, every weight on disk.

    Weights that transformers has to convert on loading are written to a temporary folder, which lives as long as
    the model. All others are read from the base's files, whenever they are needed.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gora-serve-offload-"))
        with _quiet("accelerate.big_modeling"):  # that weights are on disk is no news
            model, loaded = load(device_map={"": "disk"}, offload_folder=folder)
        weakref.finalize(model, stack.pop_all().close)
    return model, loaded


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

    Raises UsageError for a model without gradient checkpointing, without which offloading would save nothing.
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
    model.gradient_checkpointing_enable(CHECKPOINTING)  # type: ignore[operator]


def _fetch_onto(model: nn.Module, device: torch.device) -> None:
    """Hook the model anew: transformers lets a model that is wholly on disk run on the CPU."""
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
    from accelerate.utils import OffloadedWeightsLoader

    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    loader = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)  # type: ignore[union-attr]
    remove_hook_from_submodules(model)
    weights = OffloadedWeightsLoader(index=loader.index)  # type: ignore[union-attr]
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)
