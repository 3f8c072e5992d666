"""The methods of vLLM's LoRA layers and of its LoRA manager that the plugin replaces.

On CPU (`install_pools`) the buffers of a layer are a pool, filled through vLLM's own code; on GPU (`install_sizes`)
they stay as vLLM makes them, at the layer's own rank. Layers of experts, classification heads and fully sharded linear
layers stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.classifier import ClassificationHeadWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from gora_serve.vllm_plugin.fit import check_finite, check_fit
from gora_serve.vllm_plugin.kernel import can_pack
from gora_serve.vllm_plugin.pool import PooledStack, RankPool
from gora_serve.vllm_plugin.sizes import declared, pool_room, slot_rank

LINEAR = (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA)  # each has its own create and set
ENDS = (VocabParallelEmbeddingWithLoRA, LogitsProcessorWithLoRA)
logger = init_logger("vllm.gora_serve")
_installed: list[str] = []


def install_pools() -> None:
    """Replace the buffers of linear layers, embeddings and logits by pools. Once."""
    if _first_time("pools"):
        for kind in (*LINEAR, *ENDS):
            _replace(kind, "create_lora_weights", _create_pool)
        for kind in LINEAR:
            _replace(kind, "set_lora", _set_linear)
        for kind in ENDS:
            _replace(kind, "set_lora", _set_end)
        for kind in (BaseLinearLayerWithLoRA, *ENDS):
            _replace(kind, "reset_lora", _reset)
        _replace(BaseLinearLayerWithLoRA, "apply", _apply)
        _replace(VocabParallelEmbeddingWithLoRA, "forward", _embed)
        _replace(LoRAModelManager, "_create_lora_modules", _tell)
        _replace(LoRAModelManager, "_deactivate_adapter", _deactivate)
        _replace(LoRAModelManager, "remove_all_adapters", _remove_all)
        _replace(WorkerLoRAManager, "_load_adapter", partial(_load, finite=True))
        _replace(GPUModelRunner, "_get_prompt_logprobs_dict", _prompt_logprobs)  # the runner of CPUs inherits it


def install_sizes() -> None:
    """Give each layer's stacked buffers the layer's own rank. Once."""
    if _first_time("sizes"):
        for kind in (*LINEAR, *ENDS):
            _replace(kind, "create_lora_weights", _create_sized)
        _replace(WorkerLoRAManager, "_load_adapter", _load)


def pool_of(layer: Any) -> RankPool | None:
    """Return a layer's pool, None where it has vLLM's own buffers."""
    stack = getattr(layer, "lora_a_stacked", None)
    return stack.pool if isinstance(stack, PooledStack) else None


def _first_time(what: str) -> bool:
    _installed.append(what)
    return len(_installed) == 1


def _replace(kind: type, name: str, make: Callable[[Any], Any]) -> None:
    setattr(kind, name, make(kind.__dict__[name]))


def _stays(layer: Any, lora_config: Any) -> bool:
    """Whether a layer keeps vLLM's own buffers. Embeddings and logits are never sharded."""
    sharded = lora_config.fully_sharded_loras and not isinstance(layer, ENDS)
    return sharded or isinstance(layer, ClassificationHeadWithLoRA)


def _create_pool(stock: Any) -> Any:
    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        if _stays(self, lora_config):
            stock(self, max_loras, lora_config, model_config)
            return
        stock(self, 1, _with_rank(lora_config, 1), model_config)
        self.lora_config = lora_config
        a, b = _listed(self.lora_a_stacked), _listed(self.lora_b_stacked)
        picked = isinstance(self, VocabParallelEmbeddingWithLoRA)  # columns of A, by token
        wide, outs = a[0].shape[1] if picked else a[0].shape[-1], [part.shape[-2] for part in b]
        dtype, device, name = a[0].dtype, a[0].device, name_of(self)
        packed = not picked and _ends(self) == {dtype} and can_pack(wide, outs, dtype, device)
        room = pool_room(declared(), name, len(b), max_loras, lora_config.max_lora_rank)
        stack = PooledStack(a)
        stack.pool = RankPool(room, wide, outs, dtype, device=device, packed=packed, name=name)
        self.lora_a_stacked, self.lora_b_stacked = stack, tuple(b)

    return create_lora_weights


def _ends(layer: Any) -> set[torch.dtype]:
    """Return the dtypes of what a linear layer or the head takes and gives."""
    if isinstance(layer, LogitsProcessorWithLoRA):
        return {layer.dtype, layer.base_layer.head_dtype or layer.dtype}
    return {layer.base_layer.params_dtype}


def _create_sized(stock: Any) -> Any:
    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        if _stays(self, lora_config):
            stock(self, max_loras, lora_config, model_config)
            return
        rank = slot_rank(declared(), name_of(self), getattr(self, "n_slices", 1), lora_config.max_lora_rank)
        stock(self, max_loras, _with_rank(lora_config, rank), model_config)
        self.slot_rank = rank

    return create_lora_weights


def _set_linear(stock: Any) -> Any:
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        pool = pool_of(self)
        if pool is None:
            stock(self, index, lora_a, lora_b)
            return
        ranks = [part.shape[0] for part in _listed(lora_a) if part is not None]
        with _one_slot(self, max(ranks, default=0)) as written:
            stock(self, 0, lora_a, lora_b)  # cuts for tensor parallelism, and splits what is packed
        pool.put(index, written)

    return set_lora


@contextmanager
def _one_slot(layer: Any, rank: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Let vLLM's code write into stacked buffers of one slot, and yield each slice's: A (rank, in), B (out, rank)."""
    kept = layer.lora_a_stacked, layer.lora_b_stacked
    a = tuple(part.new_zeros(1, 1, rank, part.shape[-1]) for part in kept[0])
    b = tuple(part.new_zeros(1, 1, part.shape[-2], rank) for part in kept[1])
    layer.lora_a_stacked, layer.lora_b_stacked = a, b
    try:
        yield [(one[0, 0], other[0, 0]) for one, other in zip(a, b, strict=True)]
    finally:
        layer.lora_a_stacked, layer.lora_b_stacked = kept


def _set_end(stock: Any) -> Any:
    def set_lora(self: Any, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        pool = pool_of(self)
        if pool is None:
            stock(self, index, lora_a, lora_b)
            return
        pool.put(index, [(lora_a, lora_b)])

    return set_lora


def _reset(stock: Any) -> Any:
    def reset_lora(self: Any, index: int) -> None:
        pool = pool_of(self)
        if pool is None:
            stock(self, index)
            return
        pool.remove(index)

    return reset_lora


def _apply(stock: Any) -> Any:
    """vLLM's own, without its choices between devices and shapes: a decoding step asks once a layer."""

    def apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pool = pool_of(self)
        if pool is None or x.dim() != 2:
            return stock(self, x, bias)  # type: ignore[no-any-return]
        base = self.base_layer
        y: torch.Tensor = base.quant_method.apply(base, x, bias)
        self.punica_wrapper.add_pooled_linear(y, x, pool)
        return y

    return apply


def _embed(stock: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        pool = pool_of(self)
        y: torch.Tensor = stock(self, x) if pool is None else self.base_layer.forward(x)
        if pool is None:
            return y
        self.punica_wrapper.add_pooled_embedding(y, x, pool)
        return y

    return forward


def _tell(stock: Any) -> Any:
    def create_lora_modules(self: Any) -> None:
        stock(self)
        pools = [pool for layer in self.modules.values() if (pool := pool_of(layer)) is not None]
        size, packed = sum(pool.nbytes for pool in pools), sum(pool.packed for pool in pools)
        told = "LoRA buffers: %d bytes in %d layers, by the ranks of each layer; %d of the layers are packed."
        logger.info(told, size, len(pools), packed)

    return create_lora_modules


def _deactivate(stock: Any) -> Any:
    def deactivate(self: Any, lora_id: int) -> None:
        slots = [slot for slot, held in enumerate(self.lora_index_to_id) if held == lora_id]
        stock(self, lora_id)
        _free(self, slots)

    return deactivate


def _remove_all(stock: Any) -> Any:
    def remove_all_adapters(self: Any) -> None:
        stock(self)
        _free(self, range(self.lora_slots))

    return remove_all_adapters


def _free(manager: Any, slots: Any) -> None:
    for layer in manager.modules.values():
        if (pool := pool_of(layer)) is not None:
            for slot in slots:
                pool.remove(slot)


def _load(stock: Any, *, finite: bool = False) -> Any:
    def load_adapter(self: Any, lora_request: Any) -> Any:
        lora = stock(self, lora_request)
        if finite:
            check_finite(lora, lora_request.lora_name)
        check_fit(self._adapter_manager, lora, lora_request.lora_name)
        return lora

    return load_adapter


def _prompt_logprobs(stock: Any) -> Any:
    """Log probabilities of a prompt take the head of all its tokens; vLLM tells which request, and not its adapter."""

    def get_prompt_logprobs(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        layers = self.lora_manager._adapter_manager.modules.values() if self.lora_config else ()
        head = next((layer for layer in layers if isinstance(layer, LogitsProcessorWithLoRA)), None)
        if head is None or not self.num_prompt_logprobs:
            return stock(self, hidden_states, num_scheduled_tokens)
        compute = self.model.compute_logits

        def compute_logits(rows: torch.Tensor) -> Any:
            """rows: some consecutive ones of the step's hidden states, a view."""
            first = (rows.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
            with head.punica_wrapper.logits_of_tokens(first):
                return compute(rows)

        self.model.compute_logits = compute_logits
        try:
            return stock(self, hidden_states, num_scheduled_tokens)
        finally:
            del self.model.compute_logits

    return get_prompt_logprobs


def name_of(layer: Any) -> str:
    """Return the path of a layer as adapters have it, or of a packed layer as vLLM has it; "" where vLLM tells none."""
    if isinstance(layer, LogitsProcessorWithLoRA):
        return "lm_head"
    return str(getattr(layer.base_layer, "prefix", ""))


def _with_rank(lora_config: Any, rank: int) -> Any:
    changed = copy.copy(lora_config)
    changed.max_lora_rank = rank
    return changed


def _listed(parts: Any) -> list[torch.Tensor]:
    return [parts] if isinstance(parts, torch.Tensor) else list(parts)
