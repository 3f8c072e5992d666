"""What probing and training will take, from shapes alone: memory of the device and of the host, before any loading.

Every figure is a count of tensors that the program holds at the moment of its peak; docs/memory.md says which. Not
counted but measured are PROCESS, CONTEXT and, on CPUs, the holes that glibc leaves. No torch here, so `plan` is
instant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import get_args

from gora_serve.config import Offload, PlanConfig
from gora_serve.gora.ranks import lora_parameters
from gora_serve.training.activations import Job, Pass
from gora_serve.training.autocast import Autocast, autocast
from gora_serve.training.selection import no_target, select
from gora_serve.training.shapes import DTYPE_BYTES, BaseShapes

GIB = 2**30
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
JOBS: tuple[Job, ...] = ("probe exact", "probe sketch", "train")

PROCESS = 690 * 2**20  # Python with torch, transformers, peft, datasets and a tokenizer: measured, benchmarks/plan.py
CONTEXT = 500 * 2**20  # a CUDA context with its libraries; depends on the driver
SAMPLED_ROWS = 128  # rows of G that the sketch probe keeps whole, about: as many as --probe-error asks for
NF4_BITS = 4.5  # 4 a weight, and a float32 scale for 64 weights


@dataclass(frozen=True)
class Parts:
    """Bytes on one memory, by what they are for. All parts stand at the same moment, the peak.

    copies: of weights, by autocast.
    """

    weights: int = 0
    copies: int = 0
    statistics: int = 0
    adapter: int = 0
    activations: int = 0
    logits: int = 0
    holes: int = 0
    fixed: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def times(self, count: int) -> Parts:
        """Return the parts of `count` processes on one memory."""
        return Parts(*(getattr(self, field.name) * count for field in fields(self)))


@dataclass(frozen=True)
class Need:
    """What one job takes with one way of offloading: on each device, and on the host for all processes.

    Where the CPU computes, device and host are one: `device` is then the resident set of all processes.
    """

    job: Job
    offload: Offload
    checkpointing: bool
    device: Parts
    host: Parts


@dataclass(frozen=True)
class MemoryPlan:
    """Parameters and needs of one base. experts: parameters in experts, which are not adapted."""

    parameters: int
    adapter_parameters: int
    targets: int
    experts: int
    dtype_bytes: int
    needs: tuple[Need, ...]

    def need(self, job: Job, offload: Offload, *, checkpointing: bool) -> Need:
        """Return the need of this job. Offloading always checkpoints."""
        wanted = (job, offload, checkpointing or offload != "none")
        return next(need for need in self.needs if (need.job, need.offload, need.checkpointing) == wanted)


def chosen_targets(shapes: BaseShapes, targets: str) -> dict[str, tuple[int, int]]:
    """Return the modules that `targets` names, as (out, in). "attention" goes by the path: a part that says attn.

    Raises UsageError (GS-203) when nothing matches.
    """
    if targets != "attention":
        found = select(shapes.linears, targets)
    else:
        found = {path for path in shapes.linears if "attn" in path.lower() or "attention" in path.lower()}
        if not found:
            raise no_target(shapes.linears, targets)
    return {path: shape for path, shape in shapes.linears.items() if path in found}


def estimate(shapes: BaseShapes, config: PlanConfig) -> MemoryPlan:
    """Estimate every job with every way of offloading, without and with gradient checkpointing.

    Raises UsageError for settings that make no sense (GS-201) or targets that match nothing (GS-203).
    """
    config.validate()
    targets = chosen_targets(shapes, config.model.targets)
    adapter = lora_parameters(targets, config.ranks.rank)
    width = DTYPE_BYTES.get(config.model.dtype, shapes.dtype_bytes)
    case = _Case(shapes, config, targets, adapter, width, _sizes(shapes, width, nf4=config.model.quantize == "nf4"))
    needs = []
    for job in JOBS:
        needs.append(case.need(job, "none", checkpointing=False))
        stays = config.sharded or config.model.quantize != "none"  # such weights are not offloaded
        offloads = OFFLOADS[:1] if stays else OFFLOADS
        needs += [case.need(job, offload, checkpointing=True) for offload in offloads]
    return MemoryPlan(shapes.parameters, adapter, len(targets), shapes.experts, width, tuple(needs))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of all weights, of those outside of blocks, of the largest block and of the largest weight outside."""

    whole: int
    outside: int
    block: int
    outsider: int


def _sizes(shapes: BaseShapes, width: int, *, nf4: bool) -> _Sizes:
    block_of = shapes.block_of
    blocks: dict[str, int] = {}
    outside = [0]
    for name, shape in shapes.tensors.items():
        quantized = nf4 and name.removesuffix(".weight") in shapes.linears
        size = int(math.prod(shape) * NF4_BITS / 8) if quantized else math.prod(shape) * width
        if name in block_of:
            blocks[block_of[name]] = blocks.get(block_of[name], 0) + size
        else:
            outside.append(size)
    return _Sizes(sum(outside) + sum(blocks.values()), sum(outside), max(blocks.values(), default=0), max(outside))


@dataclass(frozen=True)
class _Weights:
    """Bytes of weights that a device holds while the logits are computed, and while a block is."""

    at_logits: int
    in_block: int


@dataclass(frozen=True)
class _Case:
    """One base under one configuration. width: bytes of a weight, and of an activation without autocast."""

    shapes: BaseShapes
    config: PlanConfig
    targets: Mapping[str, tuple[int, int]]
    adapter: int
    width: int
    sizes: _Sizes

    def need(self, job: Job, offload: Offload, *, checkpointing: bool) -> Need:
        """Return the need at the peak: where the logits are, or in the backward pass of one block."""
        statistics, drawn = self.statistics(job)
        narrow = self.autocast(job)
        weights, host_weights = self.weights(offload, narrow), self.host_weights(offload)
        kept, in_block, logits = self.forward(job, checkpointing=checkpointing)
        adapter = self.adapter_bytes() if job == "train" else 0
        at_logits = narrow.at_logits(checkpointing=checkpointing) if narrow else 0
        in_backward = narrow.in_block(checkpointing=checkpointing) if narrow else 0
        stages = [
            Parts(weights.at_logits, at_logits, statistics, adapter, kept, logits),
            Parts(weights.in_block, in_backward, statistics, adapter, in_block),
        ]
        peak = max(stages, key=lambda parts: parts.total)
        start = 4 * self.adapter if job == "train" else 0  # the factors that training starts from stay on the host
        processes = self.config.processes
        if self.config.device == "gpu":
            host = Parts(host_weights, statistics=drawn, adapter=start, fixed=PROCESS).times(processes)
            return Need(job, offload, checkpointing, replace(peak, fixed=CONTEXT), host)
        holes = self.one_pass(job).holes(self.tokens, checkpointing=checkpointing)
        one = replace(peak, statistics=statistics + drawn, adapter=adapter + start, holes=holes, fixed=PROCESS)
        return Need(job, offload, checkpointing, one.times(processes), Parts())

    def weights(self, offload: Offload, narrow: Autocast | None) -> _Weights:
        """Return the bytes of the weights on a device, for one process."""
        sizes = self.sizes
        if self.config.sharded:  # one block at work and the next on its way; embeddings and head stay whole
            share = sizes.outside + -(-sizes.whole // self.config.processes)
            return _Weights(share, share + 2 * sizes.block)
        if offload == "none" or (offload == "cpu" and self.config.device == "cpu"):
            resident = sizes.whole + (self.largest() if self.config.model.quantize == "nf4" else 0)
            return _Weights(resident, resident)
        times = 2 if offload == "disk" and self.config.device == "cpu" else 1  # the files' pages, and what is read
        copied = narrow is not None and narrow.block  # then autograd keeps the copies, and no weight of the block
        return _Weights(times * sizes.outsider, times * (self.largest() if copied else sizes.block))

    def host_weights(self, offload: Offload) -> int:
        """Return the bytes of the weights on the host: loading goes through it even where nothing is offloaded.

        Weights that stay on disk, or are quantized as they arrive on the device, pass one by one.
        """
        passing = offload == "disk" or self.config.model.quantize == "nf4"
        return self.sizes.block if passing else self.sizes.whole

    def largest(self) -> int:
        """Return the bytes of the largest linear layer's weight in full: a quantized one makes it when it computes."""
        return max((out * inside * self.width for out, inside in self.shapes.linears.values()), default=0)

    def statistics(self, job: Job) -> tuple[int, int]:
        """Return the bytes of sums on the device, and of the drawn A_max on the host (which a sketch sums with)."""
        shapes, k = self.targets.values(), self.config.ranks.highest
        drawn = sum(4 * k * inside for _, inside in shapes)
        if job == "probe exact":
            return sum(4 * out * inside for out, inside in shapes), drawn
        if job == "probe sketch":
            sums = sum(4 * (k * out + min(out, SAMPLED_ROWS) * inside) for out, inside in shapes)
            return sums + (drawn if self.config.device == "gpu" else 0), drawn
        return 0, 0

    def adapter_bytes(self) -> int:
        """Factors, gradients and AdamW's two moments in float32; a fifth copy to average over processes."""
        return self.adapter * (16 if self.config.processes == 1 else 20)

    @property
    def tokens(self) -> int:
        return self.config.data.batch_size * self.config.data.max_length

    def one_pass(self, job: Job) -> Pass:
        data, narrow = self.config.data, self.autocast(job)
        return Pass(
            job, self.shapes.settings, 4 if narrow and narrow.promotes else self.width, data.max_length,
            self.config.padded, self.targets, self.config.ranks.rank, narrow.width if narrow else None,
            packed=self.config.model.quantize != "none",
        )  # fmt: skip

    def autocast(self, job: Job) -> Autocast | None:
        return autocast(self.shapes, self.config, job, self.adapter)

    def forward(self, job: Job, *, checkpointing: bool) -> tuple[int, int, int]:
        """Return the bytes of activations where the logits are, and in a block's backward pass; and of logits."""
        one = self.one_pass(job)
        kept = one.block_inputs() if checkpointing else one.all_blocks()
        working = one.working() + (one.block() if checkpointing else 0)
        logits = self.tokens * self.shapes.settings.vocabulary * 2 * one.attended  # and their gradient
        product = one.product(widened=self.config.device == "cpu")
        return kept * self.tokens, (kept + working) * self.tokens + product, logits
