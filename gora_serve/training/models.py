"""A base in memory: the loaded model, its tokenizer, its adaptable modules and the digest of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gora_serve.config import ModelConfig
from gora_serve.errors import InputError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.manifest import TensorRecord, tensor_digest, weights_root


def load_settings(base: Base) -> Any:
    """Read the base's config.json through transformers. Raises InputError for a model that cannot be fitted."""
    from transformers import AutoConfig

    with _loading(base):
        settings = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    if settings.is_encoder_decoder:
        raise InputError(
            "the base is an encoder-decoder model, which the command line cannot fit yet", code="GS-343",
            file=base.path, hint="call gora_serve.training.probe.probe from Python with your own loss",
        )  # fmt: skip
    return settings


def load_model(base: Base, config: ModelConfig) -> nn.Module:
    """Load the base with its language-model head, frozen and in eval mode. Raises InputError if it cannot be."""
    from transformers import AutoModelForCausalLM

    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    with _loading(base):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    _check_loaded(model, loaded, base)
    if "logits_to_keep" not in signature(model.forward).parameters:
        raise InputError("not a causal language model", code="GS-345", file=base.path, actual=type(model).__name__)
    model.requires_grad_(False)
    frozen: nn.Module = model.eval()
    return frozen


@contextmanager
def _loading(base: Base) -> Iterator[None]:
    """Say in our words that transformers cannot load a base."""
    try:
        yield
    except (OSError, ValueError, KeyError) as err:
        raise InputError(
            "not a model that transformers can load", code="GS-367", file=base.path,
            actual=str(err).strip().splitlines()[0], hint="see the whole message with --debug",
        ) from err  # fmt: skip


def _check_loaded(model: nn.Module, loaded: Mapping[str, Any], base: Base) -> None:
    """Refuse a base with holes, which transformers would fill at random, and one in float16."""
    for kind in ("missing_keys", "mismatched_keys"):
        if loaded[kind]:
            first = sorted(map(str, loaded[kind]))[0]
            raise InputError(
                f"the base lacks weights that {type(model).__name__} needs: {len(loaded[kind])} tensors",
                code="GS-349", file=base.path, tensor=first, hint="download the base again, or give another folder",
            )  # fmt: skip
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise UsageError(
            "gradients of a base in float16 underflow", code="GS-207", file=base.path,
            hint="--dtype bfloat16, or float32",
        )  # fmt: skip


def load_tokenizer(base: Base) -> Any:
    """Load the base's tokenizer, with a padding token. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as err:
        raise InputError(
            "the base has no tokenizer that transformers can load", code="GS-368", file=base.path,
            actual=str(err).strip().splitlines()[0], hint="copy the tokenizer's files into the base's folder",
        ) from err  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token", code="GS-369", file=base.path)
    return tokenizer


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module keeps its weight as (in, out): GPT-2's Conv1D."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def weight_matrix(module: nn.Module) -> Tensor:
    """Return the weight as (out, in), whichever way the module keeps it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed(module) else weight.detach()


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by path, in the model's order, without the output head (as PEFT's all-linear)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_transposed(module)) and module is not head and path
    }


def find_targets(model: nn.Module, targets: str) -> dict[str, nn.Module]:
    """Return the modules to adapt, by path, in the model's order.

    targets: "all-linear"; "attention" (linear layers inside a module whose class name says Attention); names
    such as "q_proj,v_proj" (the end of a path); or a regular expression that matches a whole path.
    Raises UsageError when nothing matches, naming what there is.
    """
    linear = linear_modules(model)
    if targets == "all-linear":
        chosen = set(linear)
    elif targets == "attention":
        inside = [path for path, module in model.named_modules() if "Attention" in type(module).__name__]
        chosen = {path for path in linear if any(path.startswith(f"{parent}.") for parent in inside)}
    elif re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)*", targets):
        chosen = _by_name(linear, [name.strip() for name in targets.split(",")])
    else:
        chosen = _by_pattern(linear, targets)
    if not chosen:
        raise _no_target(linear, targets)
    return {path: module for path, module in linear.items() if path in chosen}


def _by_name(linear: Mapping[str, nn.Module], names: list[str]) -> set[str]:
    chosen: set[str] = set()
    for name in names:
        found = {path for path in linear if path == name or path.endswith(f".{name}")}
        if not found:
            raise _no_target(linear, name)
        chosen |= found
    return chosen


def _by_pattern(linear: Mapping[str, nn.Module], pattern: str) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as err:
        raise UsageError(
            "--targets is neither names nor a regular expression", code="GS-202", actual=f"{pattern}: {err}"
        ) from err
    return {path for path in linear if compiled.fullmatch(path)}


def _no_target(linear: Mapping[str, nn.Module], targets: str) -> UsageError:
    names = sorted({path.rsplit(".", 1)[-1] for path in linear})
    return UsageError(
        "no module matches --targets", code="GS-203", expected=f"some of {', '.join(names)}", actual=targets,
        hint="--targets all-linear",
    )  # fmt: skip


def _storages(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and persistent buffer once, by its first name: tied weights share one storage."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        yield name, tensor.detach()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory_root(model: nn.Module) -> str:
    """Return one digest of all weights as they lie in memory, by name, dtype, shape and bytes.

    The scheme is that of the file manifest; the names are the loaded model's, so compare it only with itself.
    Take it before LoRA layers are attached and after they are removed.
    """
    records = {}
    for name, tensor in _storages(model):
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = tensor_digest([memoryview(data)])  # type: ignore[arg-type]
        records[name] = TensorRecord(_dtype_name(tensor.dtype), tuple(tensor.shape), data.nbytes, digest)
    return weights_root(records)
