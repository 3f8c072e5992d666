"""How llama.cpp calls and lays out a base's weights: tensor names, and the rows of q and k that its RoPE wants.

Pure: names and shapes. Only architectures whose linear weights llama.cpp takes as they are, or with these rows moved,
are known here; what its converter does for each was read in `conversion/` of llama.cpp (convert_hf_to_gguf.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.deploy.base import EMBEDDINGS, HEADS
from gora_serve.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name. interleaved: it rotates neighbors in q and k where transformers rotates halves, so that their
    rows are moved when a model is converted (`undo_permute` in its LlamaModel). tied: whether the head is tied to the
    embeddings where config.json does not say."""

    name: str
    interleaved: bool = False
    tied: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", interleaved=True),
    "MistralForCausalLM": Architecture("llama", interleaved=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", interleaved=True, tied=True),
    "GraniteForCausalLM": Architecture("granite", interleaved=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", tied=True),
    "Gemma2ForCausalLM": Architecture("gemma2", tied=True),
    "Gemma3ForCausalLM": Architecture("gemma3", tied=True),
    "Phi3ForCausalLM": Architecture("phi3"),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "GPT2LMHeadModel": Architecture("gpt2", tied=True),
}


@dataclass(frozen=True)
class Place:
    """Where a module's update goes. heads: rows of B are moved within so many heads; 0: none are."""

    name: str
    heads: int = 0


def architecture_of(config: Mapping[str, Any], file: Path) -> Architecture:
    """Return the architecture of a base's config.json. Raises InputError (GS-3460) for one that is not known here."""
    named = config.get("architectures") or ["none"]
    found = ARCHITECTURES.get(str(named[0])) if isinstance(named, list) else None
    if found is None:
        raise InputError(
            "LoRA for llama.cpp cannot be written for this architecture", code="GS-3460", file=file,
            expected=", ".join(ARCHITECTURES), actual=named,
            hint="merge the adapter into the model, and convert the merged model",
        )  # fmt: skip
    return found


def places(paths: Iterable[str], config: Mapping[str, Any], file: Path) -> dict[str, Place]:
    """Return where each module's update goes. Raises InputError: GS-3460, GS-3461 for a module without a place.

    A head that is tied to the embeddings has none, and neither have the embeddings then: llama.cpp uses one tensor for
    both, and would apply the update twice.
    """
    import gguf

    architecture = architecture_of(config, file)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, _count(config, ("num_hidden_layers", "n_layer"), file))
    is_tied = bool(config.get("tie_word_embeddings", architecture.tied))
    found = {}
    for path in paths:
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        tied = is_tied and path.rpartition(".")[2] in (*HEADS, *EMBEDDINGS)
        if name is None or tied:
            raise InputError(
                "llama.cpp has no place for the update of this module", code="GS-3461", file=file, tensor=path,
                actual="one tensor for the embeddings and the head" if tied else f"not in {architecture.name}",
                hint="merge the adapter into the model, and convert the merged model",
            )  # fmt: skip
        found[path] = Place(name, _heads(path, config, file) if architecture.interleaved else 0)
    return found


def _heads(path: str, config: Mapping[str, Any], file: Path) -> int:
    kind = path.rpartition(".")[2]
    if kind not in ("q_proj", "k_proj"):
        return 0
    heads = _count(config, ("num_attention_heads",), file)
    if kind == "q_proj" or config.get("num_key_value_heads") is None:
        return heads
    return _count(config, ("num_key_value_heads",), file)


def _count(config: Mapping[str, Any], keys: tuple[str, ...], file: Path) -> int:
    value = next((config[key] for key in keys if key in config), None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**5:
        raise InputError(
            "config.json lacks a number that names or rows depend on", code="GS-3460", file=file, tensor=keys[0],
            expected="a whole number of at least 1", actual=value, hint="give the base that the adapter belongs to",
        )  # fmt: skip
    return value
