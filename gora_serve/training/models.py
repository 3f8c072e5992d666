"""A base from its folder into memory: the model, frozen, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from gora_serve.config import ModelConfig
from gora_serve.errors import GoraError, InputError, UsageError, counted, first_line
from gora_serve.integrity.bases import Base
from gora_serve.integrity.remote_code import refuse_remote_code
from gora_serve.training.offload import load_on_disk
from gora_serve.training.out_of_memory import naming_memory
from gora_serve.training.quantize import load_options, prepare_layers


def load_settings(base: Base) -> Any:
    """Read the base's config.json through transformers. Raises InputError where it cannot be read."""
    from transformers import AutoConfig

    refuse_remote_code(base.path)
    with _loading(base):
        settings = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    if getattr(settings, "quantization_config", None) is not None:
        raise InputError(
            "the base's weights are stored quantized", code="GS-391", file=base.path / "config.json",
            hint="give the original base; --quantize nf4 quantizes it while it is loaded",
        )  # fmt: skip
    return settings


def load_model(base: Base, config: ModelConfig, *, device: torch.device | None = None) -> nn.Module:
    """Load the base with its language-model head, frozen and in eval mode. Raises InputError if it cannot be.

    Its configuration says whether it is a causal language model or an encoder-decoder. device: where a base in 4
    bits is quantized, and stays; others are loaded into host memory.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    encoder_decoder = load_settings(base).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    options = {}
    if config.quantize == "nf4":
        options = load_options() | {"device_map": {"": device or torch.device("cpu")}}
    with _loading(base):
        load = partial(
            loader.from_pretrained,
            base.path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
        model, loaded = load_on_disk(load) if config.offload == "disk" else load()
    _check_loaded(model, loaded, base)  # also refuses what `ignore_mismatched_sizes` lets pass, by name
    if config.quantize == "nf4":
        prepare_layers(model, base.path)
    _check_kind(model, base, encoder_decoder=encoder_decoder)
    model.requires_grad_(False)
    frozen: nn.Module = model.eval()
    return frozen


def _check_kind(model: nn.Module, base: Base, *, encoder_decoder: bool) -> None:
    if encoder_decoder:
        _check_shifts_labels(model, base)
    elif "logits_to_keep" not in signature(model.forward).parameters:
        raise InputError(
            "not a causal language model",
            code="GS-345",
            hint="give a base that is a causal language model",
            file=base.path,
            actual=type(model).__name__,
        )


def _check_shifts_labels(model: nn.Module, base: Base) -> None:
    """Refuse an encoder-decoder that makes no decoder inputs from labels, on three labels of its own."""
    hint = "call gora_serve.training.probe.probe from Python with your own loss"
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise InputError(
            "an encoder-decoder that makes no decoder inputs from labels", code="GS-343", file=base.path,
            actual=type(model).__name__, hint=hint,
        )  # fmt: skip
    try:
        shift(labels=torch.tensor([[1, 2, 3]]))
    except (ValueError, TypeError, RuntimeError) as err:  # each family fails in its own way over a token that is null
        ids = {name: getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id")}
        raise InputError(
            "an encoder-decoder that cannot make decoder inputs from labels", code="GS-343",
            file=base.path / "config.json", expected="decoder_start_token_id and pad_token_id",
            actual=", ".join(f"{name} {value}" for name, value in ids.items()), hint=hint,
        ) from err  # fmt: skip


@torch.no_grad()
def check_causal(model: nn.Module, base: Base, *, device: torch.device) -> None:
    """Refuse a model that sees the tokens that it is to predict: a masked language model, which loads as a causal one.

    Two rows share their first token alone; what a causal model says after it is the same for both. The model is on
    `device`, or fetches its weights to there. Raises InputError.
    """
    size = vocabulary(model)
    ids = torch.arange(size // 2, size // 2 + 15, device=device).remainder(size)
    tokens = torch.stack([ids[:8], torch.cat([ids[:1], ids[8:]])])  # (2, 8)
    keep = torch.zeros(1, dtype=torch.long, device=device)
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, logits_to_keep=keep)
    logits = output.logits.float()  # (2, 1, vocabulary)
    dtype = model.dtype
    assert isinstance(dtype, torch.dtype)
    rounding = torch.finfo(dtype).eps ** 0.5
    if float((logits[0] - logits[1]).abs().max()) > rounding * float(logits.abs().max()):
        raise InputError(
            "not a causal language model: it sees the tokens that it is to predict", code="GS-345", file=base.path,
            actual=type(model).__name__, hint="a masked language model (BERT) cannot be trained as a causal one",
        )  # fmt: skip


def vocabulary(model: nn.Module) -> int:
    """Return how many token ids the model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


@contextmanager
def _loading(base: Base) -> Iterator[None]:
    """Say in our words that transformers cannot load a base."""
    try:
        with naming_memory():
            yield
    except GoraError:
        raise
    except Exception as err:  # over one wrong value a TypeError, ZeroDivisionError, StrictDataclassError ...
        raise InputError(
            "not a model that transformers can load", code="GS-367", file=base.path, actual=first_line(err),
            hint="see the whole message with --debug",
        ) from err  # fmt: skip


def _check_loaded(model: nn.Module, loaded: Mapping[str, Any], base: Base) -> None:
    """Refuse a base with holes, which transformers would fill at random, and one in float16."""
    hint = "download the base again, or give another folder"
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"the base lacks weights that {type(model).__name__} needs: {counted(len(missing), 'tensor')}",
            code="GS-349", file=base.path, tensor=missing[0], hint=hint,
        )  # fmt: skip
    if mismatched := sorted(loaded["mismatched_keys"]):
        tensor, found, expected = mismatched[0]
        raise InputError(
            f"weights have other shapes than {type(model).__name__} has by config.json: "
            f"{counted(len(mismatched), 'tensor')}",
            code="GS-349", file=base.path, tensor=tensor, expected=tuple(expected), actual=tuple(found), hint=hint,
        )  # fmt: skip
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise UsageError(
            "gradients of a base in float16 underflow", code="GS-207", file=base.path,
            hint="--dtype bfloat16, or float32",
        )  # fmt: skip


def load_tokenizer(base: Base) -> Any:
    """Load the base's tokenizer, with a padding token. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    refuse_remote_code(base.path)  # transformers reads config.json here too
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except Exception as err:  # tokenizers raises nothing narrower
        raise InputError(
            "the base has no tokenizer that transformers can load", code="GS-368", file=base.path,
            actual=first_line(err), hint="copy the tokenizer's files into the base's folder",
        ) from err  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token",
            code="GS-369",
            hint="set eos_token in tokenizer_config.json",
            file=base.path,
        )
    return tokenizer
