"""Which modules of a base are adapted: every linear layer, those of attention, or those that the user names."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gora_serve.training.selection import no_target, select
from gora_serve.training.weights import is_transposed, weight_shape


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by path, in the model's order, without the output head (as PEFT's all-linear)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return {
        path: module for path, module in model.named_modules() if _is_linear(module) and module is not head and path
    }


def _is_linear(module: nn.Module) -> bool:
    """Return whether it is a linear layer that is called: torch's MultiheadAttention only reads its weight."""
    linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return linear or is_transposed(module)


def out_of_reach(model: nn.Module) -> tuple[float, list[str]]:
    """Return the share of the parameters that lie in matrices outside of linear layers and embeddings, and where.

    Experts of a mixture in one fused tensor, for example: no target names them. Vectors (norms, biases) do not count.
    """
    total, found, kinds = 0, 0, set()
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if _is_linear(module) and own == "weight":
            total += math.prod(weight_shape(module))  # a quantized weight has fewer entries
            continue
        total += parameter.numel()
        if parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
            found += parameter.numel()
            kinds.add(type(module).__name__)
    return found / max(total, 1), sorted(kinds)


def find_targets(model: nn.Module, targets: str) -> dict[str, nn.Module]:
    """Return the modules to adapt, by path, in the model's order.

    targets: "all-linear"; "attention" (linear layers inside a module whose class name says Attention); names
    such as "q_proj,v_proj" (the end of a path); or a regular expression that matches a whole path.
    Raises UsageError when nothing matches, naming what there is.
    """
    linear = linear_modules(model)
    if targets != "attention":
        chosen = select(linear, targets)
    else:
        inside = [path for path, module in model.named_modules() if "Attention" in type(module).__name__]
        chosen = {path for path in linear if any(path.startswith(f"{parent}.") for parent in inside)}
        if not chosen:
            raise no_target(linear, targets)
    return {path: module for path, module in linear.items() if path in chosen}
