"""A base in 4 bits (QLoRA's NF4, through bitsandbytes): how it is loaded, read, recorded, and how far off it is.

Each linear layer but the head keeps its weight packed: 4 bits a value, one float32 scale for each 64 values. The
scales are not quantized a second time: that would save 0.37 bits of 4.5. Forward and backward passes unpack one
layer at a time into the dtype that the base was loaded in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gora_serve.errors import InputError, MachineError

CHECKED_ROWS = 64  # of one weight of each shape
TOLERANCE = 0.01  # relative; unpacking into bfloat16 rounds by at most 2^-9
IMPORT_LOG = "bitsandbytes.backends.cpu.ops"


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module is bitsandbytes' 4-bit linear layer, whose weight lies packed as (n, 1) bytes."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight that the forward pass multiplies by, (out, in), in the dtype that the base was loaded in."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, _state(module))
    return weight


def from_conv1d(module: nn.Module) -> bool:
    """Return whether a quantized module stands for GPT-2's Conv1D. transformers packs its weight as (out, in)."""
    source = getattr(module, "source_cls", None)
    return source is not None and source.__name__ == "Conv1D"


def load_options() -> dict[str, Any]:
    """Return what from_pretrained needs to quantize. Raises MachineError where bitsandbytes is not installed."""
    _need_bitsandbytes()
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    return {"quantization_config": settings}


def _need_bitsandbytes() -> None:
    try:
        _import_quietly()
    except ImportError as err:
        raise MachineError(
            "a base in 4 bits needs bitsandbytes", code="GS-530", hint="pip install 'gora-serve[quantize]'"
        ) from err


def nf4_rounder() -> Callable[[Tensor], Tensor]:
    """Return what rounds a weight, (out, in), to NF4 and back into float32, as `load_options` has bases rounded.

    Raises MachineError where bitsandbytes is not installed.
    """
    _need_bitsandbytes()
    return _through_nf4


def _through_nf4(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=False)
    return _unpacked(packed, state, weight.shape[0])


def _import_quietly() -> None:
    """Import bitsandbytes without its word about an inference kernel that is never used here."""
    log = logging.getLogger(IMPORT_LOG)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        log.setLevel(before)


def prepare_layers(model: nn.Module, folder: Path) -> None:
    """Make every quantized layer compute in the dtype that it was loaded in, from bytes that stay as they are.

    On CPUs with AVX512-BF16 bitsandbytes packs a weight anew in its first forward pass in eval mode, and rounds the
    scales to bfloat16 for good; that is turned off. Raises InputError if no layer was quantized, MachineError if
    this machine's kernel unpacks a shape wrongly.
    """
    quantized = {path: module for path, module in model.named_modules() if is_quantized(module)}
    if not quantized:
        raise InputError(
            "the base has no linear layer that bitsandbytes can quantize", code="GS-390", file=folder,
            hint="--quantize none",
        )  # fmt: skip
    for module in quantized.values():
        module.compute_dtype = _state(module).dtype
        module.support_avx512bf16_for_cpu = False
    for path, module in {tuple(_state(module).shape): (path, module) for path, module in quantized.items()}.values():
        _check_kernel(path, module)


def _state(module: nn.Module) -> Any:
    """Return bitsandbytes' QuantState: scales, code, shape, block size, dtype."""
    return module.weight.quant_state  # type: ignore[union-attr]


def _check_kernel(path: str, module: nn.Module) -> None:
    """Hold the kernel that unpacks to the definition of NF4, on the first rows of a weight.

    bitsandbytes 0.50.2 with AVX-512 mixes up the scales of rows that are no whole number of blocks.
    """
    rows = dequantized(module)[:CHECKED_ROWS].float()  # (rows, in)
    expected = _by_definition(module, rows.shape[0])
    error = float(torch.linalg.vector_norm(rows - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-30))
    if not error < TOLERANCE:
        raise MachineError(
            "bitsandbytes unpacks weights of this shape wrongly on this machine", code="GS-531", tensor=path,
            expected=f"in_features a multiple of {_state(module).blocksize}, or a machine whose kernel is right",
            actual=f"{tuple(_state(module).shape)}, relative error {error:.2g}", hint="--quantize none",
        )  # fmt: skip


def _by_definition(module: nn.Module, rows: int) -> Tensor:
    return _unpacked(module.weight.data, _state(module), rows)  # type: ignore[arg-type]


def _unpacked(packed: Tensor, state: Any, rows: int) -> Tensor:
    """Return the first rows, (rows, in) in float32: code[nibble] * scale[block], the high nibble first."""
    count = rows * state.shape[1]
    packed = packed.reshape(-1)[: (count + 1) // 2].long()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count]
    scales = state.absmax.repeat_interleave(state.blocksize)[:count]
    values: Tensor = state.code[nibbles] * scales
    return values.reshape(rows, state.shape[1])


def quantization_record(
    model: nn.Module, modules: Mapping[str, nn.Module], *, stored: Mapping[str, Path], memory_root: str
) -> dict[str, Any] | None:
    """Return what an adapter must say of the base that it was trained on; None for a base that is not quantized.

    modules: the targets. stored: the base's weight files. memory_root: digest of the loaded weights.
    """
    quantized = [module for module in model.modules() if is_quantized(module)]
    if not quantized:
        return None
    state = _state(quantized[0])
    return {
        "quantize": state.quant_type,
        "bitsandbytes": version("bitsandbytes"),
        "blocksize": state.blocksize,
        "double_quant": state.nested,
        "compute_dtype": str(state.dtype).removeprefix("torch."),
        "memory_root": memory_root,
        "modules": len(quantized),
        "weight_error": weight_error(modules, stored),
    }


def weight_error(modules: Mapping[str, nn.Module], stored: Mapping[str, Path]) -> float | None:
    """Return the mean over the quantized modules of |W - W_nf4| / |W| (Frobenius), to six digits.

    W is read from the base's files, one weight at a time. A module whose weight is stored under another name or
    shape than the model's own does not count; None where none counts.
    """
    errors = [_relative_error(module, weight) for module, weight in _stored_weights(modules, stored)]
    return float(f"{sum(errors) / len(errors):.6g}") if errors else None


def _stored_weights(modules: Mapping[str, nn.Module], stored: Mapping[str, Path]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each quantized module with its weight on disk, (out, in), under the model's name or its base model's."""
    quantized = {path: module for path, module in modules.items() if is_quantized(module)}
    for file in stored.values():
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            for path, module in quantized.items():
                short = path.partition(".")[2]
                name = next((name for name in (f"{path}.weight", f"{short}.weight") if name in names), None)
                if name is not None:
                    weight = tensors.get_tensor(name)
                    weight = weight.T if from_conv1d(module) else weight
                    if weight.shape == _state(module).shape:
                        yield module, weight


def _relative_error(module: nn.Module, weight: Tensor) -> float:
    loaded = dequantized(module).double()  # (out, in)
    difference = loaded - weight.to(loaded.device, torch.float64)
    return float(difference.norm() / (loaded - difference).norm().clamp(min=1e-30))
