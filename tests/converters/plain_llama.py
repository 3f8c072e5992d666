"""Llama's forward pass written out in float64, in the two conventions of RoPE, with an adapter as its own tool runs it.

The independent side of the tests of other tools' formats: it shares no code with the converters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Update = Callable[[str, Tensor], Tensor | float]  # (module path, input) -> what the adapter adds to the output
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def nothing(path: str, x: Tensor) -> float:
    return 0.0


class PlainLlama:
    """The model of a folder. neighbors: RoPE rotates rows (2 i, 2 i + 1) of a head, and wq and wk lie in that order."""

    def __init__(self, folder: Path, *, neighbors: bool) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.neighbors = neighbors
        self.weights = {
            name: tensor.double() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.size = self.config["hidden_size"] // self.heads
        if neighbors:
            for name in self.weights:
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    self.weights[name] = self.weights[name][self.order(self.weights[name].shape[0])]

    def order(self, rows: int) -> list[int]:
        """Of each row in the order of neighbors: where transformers has it."""
        half = self.size // 2
        return [
            head * self.size + j * half + i for head in range(rows // self.size) for i in range(half) for j in (0, 1)
        ]

    def logits(self, ids: Tensor, update: Update = nothing) -> Tensor:
        x = self.weights["model.embed_tokens.weight"][ids]  # (batch, tokens, d)
        for layer in range(self.config["num_hidden_layers"]):
            path = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{path}.input_layernorm"), f"{path}.self_attn", update)
            x = x + self._mlp(self._norm(x, f"{path}.post_attention_layernorm"), f"{path}.mlp", update)
        head = "lm_head.weight" if "lm_head.weight" in self.weights else "model.embed_tokens.weight"
        x = self._norm(x, "model.norm")
        return x @ self.weights[head].T + update("lm_head", x)

    def linear(self, path: str, x: Tensor, update: Update) -> Tensor:
        return x @ self.weights[f"{path}.weight"].T + update(path, x)

    def _norm(self, x: Tensor, path: str) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return scaled * self.weights[f"{path}.weight"]

    def _mlp(self, x: Tensor, path: str, update: Update) -> Tensor:
        gate = torch.nn.functional.silu(self.linear(f"{path}.gate_proj", x, update))
        return self.linear(f"{path}.down_proj", gate * self.linear(f"{path}.up_proj", x, update), update)

    def _attention(self, x: Tensor, path: str, update: Update) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (self.linear(f"{path}.{name}_proj", x, update).view(batch, tokens, -1, self.size) for name in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (one.repeat_interleave(self.heads // self.kv_heads, dim=2) for one in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / self.size**0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, tokens, -1)
        return self.linear(f"{path}.o_proj", mixed, update)

    def _rotate(self, x: Tensor) -> Tensor:
        """RoPE on (batch, tokens, heads, d): pair i turns by token * theta^(-2 i / d)."""
        theta = (self.config.get("rope_parameters") or self.config)["rope_theta"]
        frequencies = theta ** (-torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)  # (d / 2,)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequencies  # (tokens, 1, d / 2)
        half = self.size // 2
        one, other = (x[..., 0::2], x[..., 1::2]) if self.neighbors else (x[..., :half], x[..., half:])
        turned = one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()
        return torch.stack(turned, dim=-1).flatten(-2) if self.neighbors else torch.cat(turned, dim=-1)


def random_factors(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (r, in) and up (out, r) of each module, in float32, large enough to change every logit."""
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for path, rank in ranks.items():
        out, width = shapes[path]
        down = torch.randn(rank, width, generator=generator) / width**0.5
        factors[path] = (down, torch.randn(out, rank, generator=generator) * 0.1)
    return factors
