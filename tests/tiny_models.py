"""Builders of the tiny models, tokenizer and rows that conftest's fixtures and the tests themselves are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gora_serve.adapter.factors import Adapter

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLORS = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange")
THINGS = ("apple", "river", "stone", "cloud", "horse")
TEXTS = [
    "<|im_start|>user\nWhat color is the apple?<|im_end|>\n<|im_start|>assistant\nThe apple is red.<|im_end|>\n",
    "system user assistant: the river is blue, the stone is black, the cloud is white and the horse is brown.",
    " ".join(COLORS + THINGS),
]
LLAMA_PATHS = tuple(
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
)  # fmt: skip

MakeAdapter = Callable[..., Adapter]


def build_tokenizer() -> Any:
    """A byte-level BPE of a few hundred tokens with ChatML, as small instruct models have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256,
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    return tokenizer


def build_llama(seed: int = 0, **changes: Any) -> Any:
    """A 2-layer Llama with random weights, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).float().requires_grad_(False).eval()


def build_gpt2(seed: int = 0, *, n_embd: int = 32) -> Any:
    """A 2-layer GPT-2, whose linear layers are Conv1D: their weights lie as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=384, n_embd=n_embd, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.1, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).float().requires_grad_(False).eval()


def build_mixtral(seed: int = 0) -> Any:
    """A 1-layer mixture: four experts in fused parameters, which transformers stacks while it loads them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
        eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).float().requires_grad_(False).eval()


def build_t5(seed: int = 0, *, dropout: float = 0.0, **changes: int) -> Any:
    """A small encoder-decoder: two layers each side, gated feed-forward."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 32} | changes
    config = T5Config(
        **sizes, num_layers=2, num_heads=2, dropout_rate=dropout, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).float().requires_grad_(False).eval()


def build_bart(seed: int = 0, *, dropout: float = 0.0) -> Any:
    """Another encoder-decoder: learned positions, biases, a final bias on the logits."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=96, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128, dropout=dropout,
        init_std=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    return BartForConditionalGeneration(config).float().requires_grad_(False).eval()


def build_pair_tokenizer() -> Any:
    """As T5's: pieces that begin with a mark for a space, EOS after every text, no chat template; 96 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    core.train_from_iterator([text for row in color_rows() for text in row.values()], trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def color_rows(count: int = 40) -> list[dict[str, str]]:
    """Rows that can be learnt: the color follows from the thing."""
    rows = []
    for index in range(count):
        thing = THINGS[index % len(THINGS)]
        prompt = f"{'What color is' if index % 2 else 'Tell me the color of'} the {thing} {index}?"
        rows.append({"prompt": prompt, "completion": f"The {thing} is {COLORS[index % len(THINGS)]}."})
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def llama_shapes() -> dict[str, tuple[int, int]]:
    out_in = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
              "gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}  # fmt: skip
    return {path: out_in[path.rsplit(".", 1)[-1]] for path in LLAMA_PATHS}
