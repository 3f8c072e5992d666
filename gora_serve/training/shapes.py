"""What a base is made of, from its safetensors headers and config.json alone: parameters, linear layers, blocks.

No weight is read and torch is not imported. A folder without weights does where the shapes follow from a Llama-like
configuration. Memory is reckoned in memory.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.errors import InputError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.headers import DTYPE_BITS, TensorEntry, read_header
from gora_serve.integrity.layout import find_model

Shape = tuple[int, ...]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # whose tensors follow from the configuration
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
GATED = (*LLAMA_LIKE, *MIXTURES, "gemma", "gemma2", "gemma3_text")
HEAD_SIZES = {"qwen3": 128, "qwen3_moe": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}  # where not said
EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
HEADS = ("lm_head", "embed_out")
EXPERT = ".experts."  # routers and experts are no linear modules in transformers
BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")
BLOCK = re.compile(r"^(.*?\b(?:layers|h|block)\.\d+)\.")
LARGEST = 2**24  # of any size in config.json: a hostile number of layers must not keep us busy
MOST_LAYERS = 10_000
FETCH_AGAIN = "fetch the base's config.json again"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of safetensors' types


@dataclass(frozen=True)
class Settings:
    """The sizes that a forward pass has, under one name each. `kind` is config.json's model_type.

    intermediate: of the feed-forward layer; of all experts that a token passes through, in a mixture of experts.
    layers: of encoder and decoder together, where there are both; decoder_layers: those that attend to an encoder.
    gated: the feed-forward layer has two inner linear layers.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    decoder_layers: int = 0
    gated: bool = True

    @property
    def queries(self) -> int:
        """Width of all heads' queries together."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class BaseShapes:
    """A base as shapes. Every parameter once: a head that is tied to the embeddings is not listed.

    tensors: parameter name -> shape. dtype: of the parameters, as config.json says, else of the widest. dtype_bytes: of
    it. linears: module path -> (out, in). experts: parameters inside mixture-of-experts layers, which are no targets.
    """

    settings: Settings
    tensors: Mapping[str, Shape]
    dtype: str
    dtype_bytes: int
    linears: Mapping[str, tuple[int, int]]
    experts: int

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.tensors.values()))

    @property
    def block_of(self) -> Mapping[str, str]:
        """The block of each parameter that lies in one; embeddings, head and the last norm do not."""
        found = ((name, BLOCK.match(name)) for name in self.tensors)
        return {name: match[1] for name, match in found if match}

    @property
    def blocks(self) -> int:
        return len(set(self.block_of.values()))


def read_shapes(folder: Path) -> BaseShapes:
    """Read the shapes of the base in `folder`.

    Raises InputError (GS-380 a key of config.json is missing or no size, GS-396 an architecture or form of weights
    that cannot be planned, GS-397 no tensors), and what the readers of headers and model folders raise.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError("config.json is not an object", code="GS-380", hint=FETCH_AGAIN, file=path)
    settings = _settings(config, path)
    if _has_weights(folder):
        return _from_headers(folder, config, settings)
    if any(folder.glob("*.bin")):
        find_model(folder)  # says which files there should be
    if settings.kind not in LLAMA_LIKE:
        raise InputError(
            "without weights the shapes of this architecture are not known", code="GS-396", file=folder,
            expected=f"weights, or one of {', '.join(LLAMA_LIKE)}", actual=settings.kind,
            hint="give a folder with the weights, of which headers are read; of a hub id only JSON files are fetched",
        )  # fmt: skip
    tensors = dict(_llama_tensors(config, settings))
    dtype = _dtype(config) or "bfloat16"
    return _shapes(settings, tensors, dtype, DTYPE_BYTES[dtype])


def _dtype(config: Mapping[str, Any]) -> str | None:
    """Return what config.json says, where it is one of DTYPE_BYTES."""
    said = str(config.get("dtype") or config.get("torch_dtype"))
    return said if said in DTYPE_BYTES else None


def _settings(config: Mapping[str, Any], path: Path) -> Settings:
    kind = config.get("model_type")
    known = ", ".join((*GATED, "gpt2", "t5"))
    if config.get("quantization_config") is not None:
        raise InputError(
            "memory of weights that are stored quantized cannot be planned", code="GS-396", file=path,
            hint="give the original base, and --quantize nf4",
        )  # fmt: skip
    if kind not in known.split(", "):
        raise InputError(
            "memory of this architecture cannot be planned", code="GS-396", file=path, expected=known,
            actual=kind, hint="run probe with few --probe-steps and watch its memory",
        )  # fmt: skip

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if type(value) is int and 0 < value <= LARGEST:
                return value
            if value is not None:
                raise InputError(
                    f"{name} is no size", code="GS-380", hint=FETCH_AGAIN, file=path, expected="a number", actual=value
                )
        if default is None:
            raise InputError(
                f"config.json lacks {names[0]}", code="GS-380", file=path, expected=" or ".join(names),
                hint=FETCH_AGAIN,
            )  # fmt: skip
        return default

    hidden = size("hidden_size", "n_embd", "d_model")
    heads = size("num_attention_heads", "n_head", "num_heads")
    inner = size("intermediate_size", "n_inner", "d_ff", default=4 * hidden if kind == "gpt2" else None)
    if kind in MIXTURES:  # a token passes through this many experts
        inner = size("moe_intermediate_size", default=inner) * size("num_experts_per_tok")
    head_size = size("head_dim", "d_kv", default=HEAD_SIZES.get(str(kind), hidden // heads))
    layers, kv_heads = size("num_hidden_layers", "n_layer", "num_layers"), size("num_key_value_heads", default=heads)
    if layers > MOST_LAYERS:
        raise InputError(
            "too many layers",
            code="GS-380",
            hint=FETCH_AGAIN,
            file=path,
            expected=f"at most {MOST_LAYERS}",
            actual=layers,
        )
    decoder = size("num_decoder_layers", default=layers) if kind == "t5" else 0
    gated = kind != "t5" or str(config.get("feed_forward_proj", "relu")).startswith("gated")
    return Settings(
        str(kind), layers + decoder, hidden, heads, kv_heads, head_size, inner, size("vocab_size"), decoder, gated
    )


def _has_weights(folder: Path) -> bool:
    """Whether any weight file is here; of a hub id only the JSON files are fetched, an index among them."""
    return any(folder.glob("*.safetensors"))


def _from_headers(folder: Path, config: Mapping[str, Any], settings: Settings) -> BaseShapes:
    entries: dict[str, TensorEntry] = {}
    for path in find_model(folder).weights.values():
        entries |= read_header(path).entries
    entries = {name: entry for name, entry in entries.items() if not BUFFERS.search(name)}
    if settings.kind == "gpt2" and not any(name.startswith("transformer.") for name in entries):
        entries = {f"transformer.{name}": entry for name, entry in entries.items()}
    tied = config.get("tie_word_embeddings") is True
    kept = {name: entry for name, entry in entries.items() if not (tied and _last(name) in HEADS)}
    if not kept:
        raise InputError("the base has no tensors", code="GS-397", file=folder, hint="download the model again")
    widest = max((entry.dtype for entry in kept.values()), key=DTYPE_BITS.__getitem__)
    tensors = {name: entry.shape for name, entry in kept.items()}
    said = _dtype(config)
    dtype, width = (said, DTYPE_BYTES[said]) if said else (NAMES.get(widest, widest), DTYPE_BITS[widest] // 8)
    return _shapes(settings, tensors, dtype, width)


def _shapes(settings: Settings, tensors: Mapping[str, Shape], dtype: str, width: int) -> BaseShapes:
    linears = {}
    for name, shape in tensors.items():
        if _is_linear(name, shape, settings.kind):
            out_in = (shape[1], shape[0]) if settings.kind == "gpt2" else (shape[0], shape[1])  # Conv1D: (in, out)
            linears[name.removesuffix(".weight")] = out_in
    experts = sum(math.prod(shape) for name, shape in tensors.items() if EXPERT in name)
    return BaseShapes(settings, tensors, dtype, width, linears, experts)


def _last(name: str) -> str:
    """The module's own name: lm_head of lm_head.weight."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_linear(name: str, shape: Shape, kind: str) -> bool:
    last = _last(name)
    special = "embed" in last or last in (*EMBEDDINGS, *HEADS) or (kind in MIXTURES and last == "gate")
    return name.endswith(".weight") and len(shape) == 2 and not special and EXPERT not in name


def _llama_tensors(config: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, Shape]]:
    """The parameters of a Llama-like model, as transformers names them."""
    hidden, inner = settings.hidden, settings.intermediate
    queries, keys = settings.queries, settings.keys
    attention_bias = settings.kind == "qwen2" or config.get("attention_bias") is True
    yield "model.embed_tokens.weight", (settings.vocabulary, hidden)
    for layer in range(settings.layers):
        block = f"model.layers.{layer}"
        for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys), ("o_proj", hidden)):
            yield f"{block}.self_attn.{name}.weight", (out, queries if name == "o_proj" else hidden)
            if attention_bias and not (settings.kind == "qwen2" and name == "o_proj"):
                yield f"{block}.self_attn.{name}.bias", (out,)
        if settings.kind == "qwen3":
            yield f"{block}.self_attn.q_norm.weight", (settings.head_size,)
            yield f"{block}.self_attn.k_norm.weight", (settings.head_size,)
        for name, out in (("gate_proj", inner), ("up_proj", inner), ("down_proj", hidden)):
            yield f"{block}.mlp.{name}.weight", (out, inner if name == "down_proj" else hidden)
            if config.get("mlp_bias") is True:
                yield f"{block}.mlp.{name}.bias", (out,)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if config.get("tie_word_embeddings") is not True:
        yield "lm_head.weight", (settings.vocabulary, hidden)
