"""The gap, served by vLLM: one engine over the base as it is, with the adapters of all methods that run.py serves.

    python benchmarks/methods/served.py BASE --keep DIR [--task sentiment] [--seed 0]

Each method is trained as run.py trains it, and scored as trained, by PEFT in float32 (on CUDA with TF32). Its adapter
is served twice beside those of the others, as training saved it and as `convert` wrote it, by vLLM in float32, on CPUs
with gora-serve's plugin. The learning rate is what run.py's rows give; where a method has no whole sweep, the lowest of
its sweep, and the table says so. What was trained stays in DIR, which is of one BASE, and is not trained again.
`gora-serve serve` refuses those that are wrong unconverted, so vLLM is asked without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import facts, write

from gora_serve.serving.plugin import plugin_environment
from methods.bench import kept_name
from methods.methods import methods
from methods.run import SERVED, STEPS, Rows, Worker, best_rate, rows
from methods.tasks import TASKS, Task

KINDS = ("trained", "converted")
RANK = 32  # the largest, of GoRA
ENVIRONMENT = {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
PLUGIN = not torch.cuda.is_available()  # on CPUs vLLM's own LoRA layers take minutes for what the plugin's take seconds


def train(base: str, keep: Path, task: str, seed: int, found: Rows) -> dict[str, dict[str, Any]]:
    """Return the row of each method, made now where its folder does not have it; its `swept` says whose rate it has."""
    made: dict[str, dict[str, Any]] = {}
    worker = Worker(base, "--keep", str(keep))
    for name in SERVED:
        lr = best_rate(found, methods(STEPS)[name], task, STEPS)
        wanted = {"method": name, "task": task, "seed": seed, "lr": lr or methods(STEPS)[name].rates[0]}
        file = folder(keep, wanted) / "row.json"
        if not file.exists():
            row = worker.ask(wanted | {"steps": STEPS, "served": True})
            if "error" in row:
                raise SystemExit(f"{name}: {row['error']}")
            file.write_text(json.dumps(row), encoding="utf-8")
        made[name] = json.loads(file.read_text(encoding="utf-8")) | {"swept": lr is not None}
        print(name, made[name]["lr"], made[name]["score"], flush=True)
    worker.close()
    return made


def folder(keep: Path, row: dict[str, Any]) -> Path:
    """Return where one.py keeps a row's adapters."""
    return (keep / kept_name(row["method"], row["task"], row["seed"], row["lr"])).absolute()


def ask(base: str, adapters: dict[str, Path], task: Task) -> dict[str, float]:
    """Return the score of the base, "", and of each adapter, all in one engine."""
    os.environ |= ENVIRONMENT | (plugin_environment(None) if PLUGIN else {})  # before vLLM is imported
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    slots = len(adapters) + 1  # on a CPU the last slot must stay empty (vllm-project/vllm#48421)
    engine = LLM(
        base, dtype="float32", enforce_eager=True, max_model_len=1024, enable_lora=True, max_lora_rank=RANK,
        max_loras=slots, max_cpu_loras=slots,
    )  # fmt: skip
    wanted = task.rows("test", task.scored)
    turns: list[Any] = [[{"role": "user", "content": row["prompt"]}] for row in wanted]
    greedy = SamplingParams(temperature=0.0, max_tokens=task.longest)
    scores = {}
    for number, (name, folder) in enumerate({"": None, **adapters}.items()):
        request = LoRARequest(name, number, str(folder)) if folder else None
        texts = [one.outputs[0].text for one in engine.chat(turns, greedy, lora_request=request, use_tqdm=False)]
        scores[name] = statistics.fmean(map(task.credit, texts, wanted))
        print(name or "base", f"{scores[name]:.3f}", flush=True)
    return scores


def engine_name() -> str:
    """Return vLLM's package, of GPUs or of CPUs, with its version."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    raise SystemExit("vLLM is not installed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--task", default="sentiment", choices=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    made = train(asked.base, asked.keep, asked.task, asked.seed, rows())
    head = facts(f"python benchmarks/methods/served.py BASE --keep DIR --task {asked.task} --seed {asked.seed}")
    settings = {"engine": engine_name(), "plugin": PLUGIN, "task": asked.task, "seed": asked.seed, "steps": STEPS}
    folders = {f"{name}-{kind}": folder(asked.keep, row) / kind for name, row in made.items() for kind in KINDS}
    scores = ask(asked.base, folders, TASKS[asked.task])
    table = {
        name: {
            "lr": row["lr"], "swept": row["swept"], "as trained": row["score"], "trained on": row["device"],
            "commit": row["commit"],
            "by vLLM": {kind: scores[f"{name}-{kind}"] for kind in KINDS},
        }
        for name, row in made.items()
    }  # fmt: skip
    write("served", head | settings | {"base": scores[""], "methods": table})


if __name__ == "__main__":
    main()
