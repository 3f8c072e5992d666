"""What autocast (`--mixed-precision`) adds to a plan: narrower numbers, and copies of frozen weights. No torch here.

A linear layer's backward pass needs its weight. Where autocast made a copy of it, autograd keeps the copy, and it is
kept from the forward pass on because frozen weights are not in autocast's cache (torch 2.13, aten/autocast_mode.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from gora_serve.config import PlanConfig
from gora_serve.training.activations import Job
from gora_serve.training.shapes import BLOCK, DTYPE_BYTES, BaseShapes

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Autocast:
    """width: bytes of a number that attention, LoRA layers and the head compute with. blocks, block, head, factors:
    bytes of the copies of linear layers' weights, in all blocks and in the largest one, of the head, of LoRA factors.
    promotes: weights have another dtype, so that sums of blocks and what they add are float32.
    """

    width: int
    blocks: int
    block: int
    head: int
    factors: int
    promotes: bool

    def at_logits(self, *, checkpointing: bool) -> int:
        """Bytes of the copies that stand where the logits are; those of factors are cached while the model computes."""
        return self.factors + self.head + (0 if checkpointing else self.blocks)

    def in_block(self, *, checkpointing: bool) -> int:
        """Bytes of the copies that stand in the backward pass of a block."""
        return self.block if checkpointing else self.blocks + self.factors


def autocast(shapes: BaseShapes, config: PlanConfig, job: Job, adapter: int) -> Autocast | None:
    """Return what autocast does in a job, None where there is none: for fp16 in a probe and on a CPU.

    adapter: parameters of the LoRA layers, which are float32.
    """
    precision = config.mixed_precision
    if precision == "no" or (precision == "fp16" and (job != "train" or config.device == "cpu")):
        return None
    dtype = DTYPES[precision]
    width = DTYPE_BYTES[dtype]
    factors = width * adapter if job == "train" else 0
    if (shapes.dtype if config.model.dtype == "auto" else config.model.dtype) == dtype:
        return Autocast(width, 0, 0, 0, factors, promotes=False)
    blocks: dict[str, int] = {}
    for path, (out, inside) in shapes.linears.items() if config.model.quantize == "none" else ():
        found = BLOCK.match(path)
        block = found[1] if found else path
        blocks[block] = blocks.get(block, 0) + out * inside * width
    head = shapes.settings.vocabulary * shapes.settings.hidden * width
    return Autocast(width, sum(blocks.values()), max(blocks.values(), default=0), head, factors, promotes=True)
