"""The weights of a loaded base: one module's as (out, in), and one digest of all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gora_serve.integrity.manifest import TensorRecord, tensor_digest, weights_root
from gora_serve.training.quantize import dequantized, from_conv1d, is_quantized


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module keeps its weight as (in, out): GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the base's own weight is (in, out), even where the loaded, quantized one is not."""
    return is_transposed(module) or from_conv1d(module)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear module, whichever way and wherever its weight is kept."""
    if is_transposed(module):
        nf, nx = module.nf, module.nx
        return int(nf), int(nx)  # type: ignore[arg-type]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the weight as (out, in), whichever way the module keeps it.

    An offloaded weight is read and a quantized one is unpacked at each call. A sharded one is gathered: all processes
    call this together.
    """
    if is_quantized(module):
        return dequantized(module)
    weight = whole_tensor(module, "weight")
    return weight.T if is_transposed(module) else weight


def whole_tensor(module: nn.Module, name: str) -> Tensor:
    """Return a module's own parameter or buffer with all its values, wherever Accelerate keeps them."""
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    if tensor.is_meta:
        offloaded: Tensor = module._hf_hook.weights_map[name]  # type: ignore[union-attr, index]
        return offloaded.detach()
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor()
        return whole.detach()
    return tensor.detach()


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that the module's weight is on while the module runs."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device  # type: ignore[union-attr, arg-type]


def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and persistent buffer by name, one at a time in memory. Tied ones come by each name."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta or isinstance(tensor, DTensor):
            path, _, own = name.rpartition(".")
            tensor = whole_tensor(model.get_submodule(path), own)
        yield name, tensor.detach()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory_root(model: nn.Module) -> str:
    """Return one digest of all weights as the model computes with them, by name, dtype, shape and bytes.

    The scheme is that of the file manifest; the names are the loaded model's, so compare it only with itself.
    Take it before LoRA layers are attached and after they are removed.
    """
    records = {}
    for name, tensor in _whole_tensors(model):
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = tensor_digest([memoryview(data)])  # type: ignore[arg-type]
        records[name] = TensorRecord(_dtype_name(tensor.dtype), tuple(tensor.shape), data.nbytes, digest)
    return weights_root(records)
