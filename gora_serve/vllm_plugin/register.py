"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes before any model is made.

It does nothing unless GORA_SERVE_PLUGIN is 1, and warns and does nothing for a vLLM that it was not tested with. Of
vLLM's own objects it changes one: the platform's answer to which Punica wrapper is to be used. The layers are changed
when that is asked for, which is when the first LoRA model is made.
"""

from __future__ import annotations

import multiprocessing
import os

from gora_serve.serving.plugin import ON, SWITCH, why_stock

WRAPPER = "gora_serve.vllm_plugin.punica.PooledPunicaWrapper"


def register() -> None:
    """Turn the plugin on where the environment asks for it."""
    if os.environ.get(SWITCH) != ON:
        return
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger("vllm.gora_serve")
    reason = why_stock(vllm.__version__)
    if reason:
        if multiprocessing.parent_process() is None:  # once, not in every process of the engine
            logger.warning("gora-serve's LoRA plugin is off, vLLM runs as it is: %s", reason)
        return
    if current_platform.is_cpu():
        _use_pools(type(current_platform))
    elif current_platform.is_cuda_alike():
        _use_sizes(type(current_platform))


def _use_pools(platform: type) -> None:
    def get_punica_wrapper(cls: type) -> str:
        from gora_serve.vllm_plugin.hooks import install_pools

        install_pools()
        return WRAPPER

    platform.get_punica_wrapper = classmethod(get_punica_wrapper)  # type: ignore[attr-defined]


def _use_sizes(platform: type) -> None:
    stock = platform.get_punica_wrapper  # type: ignore[attr-defined]

    def get_punica_wrapper(cls: type) -> str:
        from gora_serve.vllm_plugin.hooks import install_sizes

        install_sizes()
        return str(stock())

    platform.get_punica_wrapper = classmethod(get_punica_wrapper)  # type: ignore[attr-defined]
