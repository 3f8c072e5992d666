"""What does the probe cost? Step time and memory against a plain step and against PEFT's LoRA-GA preprocessing.

    .venv/bin/python benchmarks/probe.py gora-demo/base

Of PEFT's preprocessing and of the exact probe it is the median of first steps, of the sketch of those after its first.
Times are taken in turns in one process, so that each ratio is of steps a moment apart; the ratio is the median over
rounds. Memory is the peak of the resident set over one step, in a fresh process for each kind of step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import facts, write
from torch import Tensor, nn

from gora_serve.config import ProbeConfig, RankConfig, TrainConfig
from gora_serve.gora.initialize import draw_A, initialize
from gora_serve.gora.ranks import allocate_ranks
from gora_serve.training.loss import mean_loss
from gora_serve.training.probe import probe
from gora_serve.training.targets import linear_modules

ROWS, LENGTH, ROUNDS = 4, 256, 3
SEED = 0
DATA = Path(__file__).parent.parent / "examples" / "data"
# Llama-3.1-8B, all linear layers: (out, in) and how many.
LLAMA_8B = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
LAYERS_8B = 32
PAPER_SECONDS = {8: 1.4, 32: 1.56, 128: 3.43}  # the authors' answer to reviewer 4NWP, on an A800 GPU

Step = Callable[[], object]
LossFunction = Callable[[nn.Module, Any], Tensor]


def load(base: str, *, checkpointing: bool = False) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False).eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # SmolLM2 has no dropout; checkpoints are only used in training mode
    return model  # type: ignore[no-any-return]


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def text_batch(base: str) -> dict[str, Tensor]:
    """Rows of real text, cut to LENGTH tokens: how many rows of a gradient a sketch needs depends on the data."""
    from transformers import AutoTokenizer

    text = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(base)(text)["input_ids"][: ROWS * LENGTH]
    return as_batch(torch.tensor(ids).view(ROWS, LENGTH))


def random_batch(vocabulary: int) -> dict[str, Tensor]:
    return as_batch(torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED)))


def block_8b() -> nn.Module:
    """One block of Llama-3.1-8B with random weights and a small vocabulary: what the ratio is in a large model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
        vocab_size=1024,
    )  # fmt: skip
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).bfloat16().requires_grad_(False).eval()


def plain(model: nn.Module, batch: dict[str, Tensor], loss_fn: LossFunction) -> Step:
    """Forward and backward with every weight frozen: gradients flow from the embedding's output on."""

    def step() -> None:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        handle = embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        handle.remove()

    return step


def transformers_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


LORA_GA = {"LoRA-GA of PEFT": mean_loss, "LoRA-GA of PEFT, transformers' loss": transformers_loss}


def timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def probe_steps(model: nn.Module, batch: dict[str, Tensor], mode: str, between: Step, count: int) -> list[float]:
    """Seconds of `count` steps of a probe, each after a call of `between`. A sketch's pilot step is not among them."""
    seconds: list[float] = []
    started = [0.0]

    def batches() -> Iterator[dict[str, Tensor]]:
        for number in range(count + (mode == "sketch")):
            if number or mode != "sketch":
                between()
            started[0] = time.perf_counter()
            yield batch

    def after_step(_event: object) -> None:
        seconds.append(time.perf_counter() - started[0])

    chosen = ProbeConfig(steps=count + (mode == "sketch"), mode=mode)  # type: ignore[arg-type]
    probe(model, batches(), mean_loss, config=chosen, listen=after_step)
    return seconds[-count:]  # the first of a sketch holds the pilot


def lora_ga_steps(model: nn.Module, batch: dict[str, Tensor], loss_fn: LossFunction, count: int) -> list[float]:
    from peft import LoraConfig, LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    seconds: list[float] = []

    def steps() -> None:
        for _ in range(count):
            seconds.append(timed(lambda: loss_fn(model, batch).backward()))  # type: ignore[no-untyped-call]

    targets = list(linear_modules(model))
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), target_modules=targets)
    preprocess_loraga(model, config, steps)
    model.requires_grad_(False)
    for path in targets:
        del model.get_submodule(path)._peft_loraga_grad
    return seconds


def probe_times(model: nn.Module, batch: dict[str, Tensor], *, rounds: int) -> dict[str, Any]:
    kinds = {"plain": mean_loss, "plain, transformers' loss": transformers_loss}
    steps = {name: plain(model, batch, loss_fn) for name, loss_fn in kinds.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "sketch", "exact", *LORA_GA)}

    def between() -> None:
        for name, step in steps.items():
            seconds[name].append(timed(step))

    for _ in range(rounds):
        seconds["sketch"] += probe_steps(model, batch, "sketch", between, 3)
        seconds["exact"] += probe_steps(model, batch, "exact", lambda: None, 1)
        for name, loss_fn in LORA_GA.items():
            seconds[name] += lora_ga_steps(model, batch, loss_fn, 1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = {
        f"sketch / {name}": [one / other for one, other in zip(seconds["sketch"], seconds[name], strict=True)]
        for name in kinds
    }
    return {
        "median seconds of a step": {name: round(value, 4) for name, value in medians.items()},
        **{f"{name}, median of pairs": round(statistics.median(values), 4) for name, values in pairs.items()},
        **{f"sketch / {name}": round(medians["sketch"] / medians[name], 4) for name in LORA_GA},
        "exact / plain": round(medians["exact"] / medians["plain"], 4),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
    }


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of(step: Step) -> int:
    """Bytes by which the resident set's peak during `step` exceeds what was resident before it."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return status("VmHWM") - before


def measure_memory(base: str, kind: str, *, checkpointing: bool) -> None:
    """Run in a fresh process: print the peak over what the loaded model takes, of two steps of one kind."""
    model, batch = load(base, checkpointing=checkpointing), text_batch(base)
    kinds: dict[str, Step] = {
        "plain": lambda: [plain(model, batch, mean_loss)() for _ in range(2)],
        "plain, transformers' loss": lambda: [plain(model, batch, transformers_loss)() for _ in range(2)],
        "sketch": lambda: probe_steps(model, batch, "sketch", lambda: None, 2),
        "exact": lambda: probe_steps(model, batch, "exact", lambda: None, 2),
        "LoRA-GA of PEFT": lambda: lora_ga_steps(model, batch, mean_loss, 2),
    }
    plain(model, batch, transformers_loss if "transformers" in kind else mean_loss)()  # libraries' own buffers
    print(json.dumps(peak_of(kinds[kind])))


def probe_memory(base: str) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    result: dict[str, Any] = {"bytes of the base": size}
    # every tensor of over 64 KiB is mapped by itself, and so given back at once when it is freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for checkpointing in (False, True):
        peaks = {}
        for kind in ("plain", "plain, transformers' loss", "sketch", "exact", "LoRA-GA of PEFT"):
            command = [sys.executable, __file__, base, "--memory", kind, str(int(checkpointing))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            peaks[kind] = int(done.stdout.splitlines()[-1])
        extra = {
            f"{kind} over {plain_kind}, share of the base": round((peaks[kind] - peaks[plain_kind]) / size, 4)
            for plain_kind in ("plain", "plain, transformers' loss")
            for kind in ("sketch", "exact", "LoRA-GA of PEFT")
        }
        name = "with gradient checkpointing" if checkpointing else "without gradient checkpointing"
        result[name] = {"peak bytes over the loaded model": peaks, "extra": extra}
    return result


def initialization() -> dict[str, Any]:
    """Allocation and initialisation of all modules of Llama-3.1-8B, from statistics as the probe leaves them: the
    product of the gradient with A is made there, and is not counted.
    """
    generator = torch.Generator().manual_seed(SEED)
    shapes = {f"{layer}.{name}": shape for layer in range(LAYERS_8B) for name, shape in LLAMA_8B.items()}
    importances = dict(zip(shapes, torch.rand(len(shapes), generator=generator).add(0.2).tolist(), strict=True))
    gradients = {shape: torch.randn(shape, generator=generator) for shape in set(LLAMA_8B.values())}
    result = {}
    for rank, paper in PAPER_SECONDS.items():
        config = RankConfig(rank=rank)
        matrices = {shape: draw_A(shape, config.highest, generator) for shape in gradients}
        compressed = {shape: G @ matrices[shape].T for shape, G in gradients.items()}
        started = time.perf_counter()
        plan = allocate_ranks(importances, shapes, config)
        for path, shape in shapes.items():
            initialize(matrices[shape], compressed[shape], rank=plan.ranks[path], gamma=0.05, alpha=16.0)
        ours = time.perf_counter() - started
        result[str(rank)] = {
            "seconds": round(ours, 3), "the paper's seconds, on a GPU": paper, "largest rank": max(plan.ranks.values()),
        }  # fmt: skip
    return result


def training_times(base: str) -> dict[str, Any]:
    """One step of our loop against the same step written by hand with PEFT and torch, in turns."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    from gora_serve.gora.ranks import uniform_ranks
    from gora_serve.training import inject
    from gora_serve.training.loop import train

    batch = text_batch(base)
    ours, by_hand = load(base), load(base)
    shapes = {path: (m.out_features, m.in_features) for path, m in linear_modules(ours).items()}
    plan = uniform_ranks(shapes, RankConfig())
    factors = inject.lora_factors(plan, alpha=16.0, generator=torch.Generator().manual_seed(SEED))
    model = inject.attach(ours, factors, task_type="CAUSAL_LM", fan_in_fan_out=False)
    hand = get_peft_model(by_hand, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    hand.train()
    parameters = [parameter for parameter in hand.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds: dict[str, list[float]] = {"ours": [], "by hand": []}
    last = [0.0]

    def hand_step() -> None:
        hand(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def after_step(_step: int) -> None:
        seconds["ours"].append(time.perf_counter() - last[0])
        seconds["by hand"].append(timed(hand_step))
        last[0] = time.perf_counter()

    last[0] = time.perf_counter()
    train(
        model, [lambda: batch] * 6, accelerator=Accelerator(cpu=True), config=TrainConfig(),
        record=lambda numbers: None, after_step=after_step, listen=lambda event: None,
    )  # fmt: skip
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "median seconds of a step": {name: round(value, 4) for name, value in medians.items()},
        "ours / by hand": round(medians["ours"] / medians["by hand"], 4),
    }


def main() -> None:
    base = sys.argv[1] if len(sys.argv) > 1 else "gora-demo/base"
    if len(sys.argv) > 3:
        measure_memory(base, sys.argv[3], checkpointing=sys.argv[4] == "1")
        return
    result = facts("make demo && .venv/bin/python benchmarks/probe.py gora-demo/base")
    result["settings"] = {"rows": ROWS, "tokens a row": LENGTH, "dtype": "bfloat16", "threads": torch.get_num_threads()}
    for name, part in (
        ("time of a probe step", lambda: probe_times(load(base), text_batch(base), rounds=ROUNDS)),
        (
            "time of a probe step, one block of Llama-3.1-8B",
            lambda: probe_times(block_8b(), random_batch(1024), rounds=2),
        ),
        ("memory of a probe step", lambda: probe_memory(base)),
        ("allocation and initialisation, Llama-3.1-8B, all linear layers", initialization),
        ("time of a training step", lambda: training_times(base)),
    ):
        result[name] = part()
        print(name, json.dumps(result[name], indent=1), flush=True)
    write("probe", result)


if __name__ == "__main__":
    main()
