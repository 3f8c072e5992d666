"""A base that is spread over processes by FSDP2, as Accelerate's configuration says.

Every process keeps a part of each weight; a block's weights are gathered while it runs. The base is sharded before
it is probed, and LoRA factors come later: they are plain tensors, whole on every process.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from gora_serve.config import ModelConfig
from gora_serve.errors import UsageError


def wants_sharding(accelerator: Any) -> bool:
    """Return whether the launch asked for FSDP and there is something to spread over."""
    # On CPUs Accelerate reads the FSDP settings but goes on with plain processes: the environment still tells.
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(accelerator: Any, config: ModelConfig) -> None:
    """Raise UsageError for FSDP settings that the base cannot be sharded with."""
    if not wants_sharding(accelerator):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "the first version of FSDP is not supported", code="GS-224", expected="--fsdp_version 2",
            hint="launch with --fsdp_version 2",
            actual=f"--fsdp_version {os.environ.get('FSDP_VERSION', '1')}",
        )  # fmt: skip
    if config.quantize != "none":
        raise UsageError(
            "FSDP cannot spread weights that --quantize packs", code="GS-228", actual=f"--quantize {config.quantize}",
            hint="--quantize none, or launch without FSDP",
        )  # fmt: skip
    if config.offload != "none":
        raise UsageError(
            "--offload and FSDP are two ways to keep weights elsewhere", code="GS-223",
            actual=f"--offload {config.offload}", hint="--offload none; FSDP's own is --fsdp_offload_params true",
        )  # fmt: skip


def check_unsharded(accelerator: Any, what: str) -> None:
    """Raise UsageError where the base is sharded: `what` needs whole weights."""
    if wants_sharding(accelerator):
        raise UsageError(f"{what} needs whole weights on every process", code="GS-227", hint="launch without FSDP")


def shard(model: nn.Module, accelerator: Any) -> nn.Module:
    """Spread the base over the processes, in place. All of them call this together."""
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    # `prepare` would do this only together with an optimizer, and never on CPUs.
    plugin = FullyShardedDataParallelPlugin()
    if plugin.auto_wrap_policy is None:  # without one, all blocks would be gathered at once
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    accelerator.state.fsdp_plugin = plugin
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    if plugin.activation_checkpointing:
        sharded.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return sharded
