"""What autograd keeps of a forward pass over a base whose weights are frozen, in bytes a token, block by block.

Counted as transformers' models and PEFT's layers compute (saved tensors of torch 2.13; tests compare the counts with
what autograd saves). No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gora_serve.training.shapes import BLOCK, Settings

Job = Literal["probe exact", "probe sketch", "train"]

LARGEST_HOLE = 2**25  # glibc gives larger tensors a mapping of their own
SHARED_INPUT = {  # linear layers of one parent that read the same tensor
    "q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp",
    "q": "attention", "k": "attention", "v": "attention", "wi_0": "mlp", "wi_1": "mlp",
}  # fmt: skip
KEPT_ANYWAY = (".o_proj", ".attn.c_proj", ".o")  # their input is attention's output, which attention keeps
INNER = (".down_proj", ".mlp.c_proj")  # their input is the feed-forward layer's own, and no norm's output


@dataclass(frozen=True)
class Pass:
    """One job's forward pass: which layers are tapped or adapted, and how wide numbers are.

    width: bytes of a number in the residual stream: that of the weights, but under autocast to another dtype float32.
    length: tokens of a row. padded: rows of unequal length, so that attention gets a mask and every query head a key
    and value of its own. targets: module path -> (out, in). autocast: bytes of a number that it computes with, None
    without. packed: weights are quantized, so that linear layers give their inputs' dtype also under autocast.
    """

    job: Job
    settings: Settings
    width: int
    length: int
    padded: bool
    targets: Mapping[str, tuple[int, int]]
    rank: int
    autocast: int | None = None
    packed: bool = False

    @property
    def attended(self) -> int:
        """Bytes of a number in attention and of a logit."""
        return self.autocast or self.width

    @property
    def computed(self) -> int:
        """Bytes of a number that a linear layer of the base gives."""
        return self.width if self.packed else self.attended

    def block(self) -> int:
        """Bytes that the largest block keeps of a token."""
        blocks: dict[str, dict[str, tuple[int, int]]] = {}
        for path, shape in self.targets.items():
            found = BLOCK.match(path)
            blocks.setdefault(found[1] if found else "", {})[path] = shape
        model = self.of_decoder() if self.settings.decoder_layers else self.of_model()
        return model + max((self.of_targets(inner) for inner in blocks.values()), default=0)

    def all_blocks(self) -> int:
        """Bytes that all blocks keep of a token, without gradient checkpointing, and the last norm."""
        s = self.settings
        blocks = (s.layers - s.decoder_layers) * self.of_model() + s.decoder_layers * self.of_decoder()
        return blocks + self.of_targets(self.targets) + 4 * s.hidden

    def block_inputs(self) -> int:
        """Bytes that are kept of a token with gradient checkpointing: the input of each block, and the last norm."""
        return (self.settings.layers * self.width + 4) * self.settings.hidden

    def of_decoder(self) -> int:
        """Bytes that a block with attention to an encoder keeps of a token, both sides having as many tokens."""
        s = self.settings
        return self.of_model() + 4 * (self.attended * s.queries + s.heads) + self.norm()

    def norm(self) -> int:
        """Bytes that an RMSNorm keeps of a token: its input in float32, T5's also as it was; one number a row."""
        s = self.settings
        return 4 * (s.hidden + 1) + (self.width * s.hidden if s.kind == "t5" and self.width < 4 else 0)

    def of_model(self) -> int:
        """Bytes that one block keeps of a token whatever is adapted."""
        s, e, inner = self.settings, self.attended, self.computed * self.settings.intermediate
        if s.kind == "t5":  # every head has its own bias for two positions, of every row; gelu_new as below
            mask = e * s.heads * self.length
            return 4 * (e * s.queries + s.heads) + mask + 2 * self.norm() + (6 if s.gated else 0) * inner
        keys = s.queries if self.padded else s.keys
        attention = e * (2 * s.queries + 2 * keys) + 4 * s.heads + (e * self.length if self.padded else 0)
        if s.kind == "gpt2":  # LayerNorm keeps its input; gelu_new is five steps, of which four tensors are kept
            return attention + 2 * self.width * (s.hidden + 2) + 4 * inner
        norms = 4 if s.kind in ("gemma2", "gemma3_text") else 2  # RMSNorm keeps its input in float32
        heads = 4 * (s.queries + s.keys) if s.kind in ("qwen3", "qwen3_moe", "gemma3_text") else 0
        return attention + norms * self.norm() + heads + 3 * inner

    def of_targets(self, targets: Mapping[str, tuple[int, int]]) -> int:
        """Bytes kept of a token for the targets' own sake: their inputs."""
        low_rank = (self.autocast or 4) * self.rank * len(targets) if self.job == "train" else 0
        if self.job == "train" and (self.width < 4 or self.autocast):  # each LoRA layer casts its input by itself
            return low_rank + sum((self.autocast or 4) * inside for _, inside in targets.values())
        inputs = {}
        for path, (_, inside) in targets.items():
            if not path.endswith(KEPT_ANYWAY):
                parent, _, name = path.rpartition(".")
                width = self.computed if path.endswith(INNER) else self.width
                inputs[f"{parent}.{SHARED_INPUT.get(name, name)}"] = width * inside
        return low_rank + sum(inputs.values())

    def working(self) -> int:
        """Bytes of a token at work in a block's backward pass: gradients of the widest layers, and in training copies
        of a layer's input and output, in float32 but under autocast."""
        gradients = 3 * self.computed * self.settings.intermediate
        if self.job != "train":
            return gradients
        return gradients + (self.autocast or 4) * max((sum(shape) for shape in self.targets.values()), default=0)

    def product(self, *, widened: bool) -> int:
        """Bytes of the largest weight gradient of a micro-batch in an exact probe, before it is added in float32.

        widened: torch adds it by way of a copy in float32, as on CPUs.
        """
        if self.job != "probe exact" or self.computed == 4:
            return 0  # added as it is computed
        largest = max((out * inside for out, inside in self.targets.values()), default=0)
        return (self.computed + (4 if widened else 0)) * largest

    def holes(self, tokens: int, *, checkpointing: bool) -> int:
        """Bytes of freed tensors on a CPU that glibc cannot use again, because kept ones were put around them.

        Measured, not counted (benchmarks/plan.py, glibc 2.36): each target leaves one float32 tensor like its output,
        two in training in float32 without checkpointing.
        """
        sizes = (4 * out * tokens for out, _ in self.targets.values())
        twice = self.job == "train" and self.computed == 4 and not checkpointing
        return (2 if twice else 1) * sum(size for size in sizes if size < LARGEST_HOLE)
