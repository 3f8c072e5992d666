"""Write the tables of docs/memory.md: `python docs/make_memory.py`. A test tells when they are out of date."""

from __future__ import annotations

import json
import re
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gora_serve.config import DataConfig, ModelConfig, PlanConfig
from gora_serve.training.memory import GIB, MemoryPlan, estimate
from gora_serve.training.shapes import BaseShapes, read_shapes

FILE = Path(__file__).parent / "memory.md"
RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "plan.json"
BEGIN, END = "<!-- written by make_memory.py -->\n", "<!-- end -->\n"
BASES = {
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Qwen2.5-32B": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064,
    },
    "Llama-3.1-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
CONFIG = PlanConfig(data=DataConfig(1024, batch_size=1))
WAYS = {
    "one device": CONFIG,
    "nf4": replace(CONFIG, model=ModelConfig(quantize="nf4")),
    "8 devices, FSDP2": replace(CONFIG, processes=8, sharded=True),
}


def shapes_of(config: dict[str, object]) -> BaseShapes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
        return read_shapes(Path(folder))


def rows_of(plan: MemoryPlan, way: str) -> Iterator[str]:
    train = [need for need in plan.needs if need.job == "train"]
    for need in train:
        exact, sketch = (
            plan.need(job, need.offload, checkpointing=need.checkpointing).device.total
            for job in ("probe exact", "probe sketch")  # type: ignore[attr-defined]
        )
        manner = f"offload {need.offload}" if need.offload != "none" else "checkpointing" if need.checkpointing else "-"
        cells = (exact, sketch, need.device.total, need.host.total)
        yield f"| {way} | {manner} | " + " | ".join(f"{size / GIB:.1f}" for size in cells) + " |"


def tables() -> str:
    """What stands between the marks."""
    parts = []
    for name, config in BASES.items():
        shapes = shapes_of(config)
        plans = {way: estimate(shapes, settings) for way, settings in WAYS.items()}
        first = plans["one device"]
        parts.append(
            f"### {name}\n\n{first.parameters:,} parameters; the adapter has {first.adapter_parameters:,} in "
            f"{first.targets} modules.\n\n"
            "| on | saved by | probe exact | probe sketch | train | host |\n| --- | --- | --: | --: | --: | --: |\n"
            + "\n".join(row for way, plan in plans.items() for row in rows_of(plan, way))
            + "\n"
        )
    return "\n" + "\n".join(parts) + "\n"


def measured() -> str:
    """The table of what was planned and what was measured, from the benchmark's result."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    returned = result["with_freed_memory_returned"]
    lines = ["| job | dtype | tokens | saved by | planned, MiB | measured, MiB | error |",
             "| --- | --- | --- | --- | --: | --: | --: |"]  # fmt: skip
    for case in result["cases"]:
        manner = f"offload {case['offload']}" if case["offload"] != "none" else "-"
        manner = "checkpointing" if case["checkpointing"] and manner == "-" else manner
        tokens = f"{case['batch_size']} x {case['max_length']}"
        dtype = case["dtype"] + (f", mixed {case['mixed_precision']}" if case["mixed_precision"] != "no" else "")
        numbers = f"{case['planned_mib']:.0f} | {case['measured_mib']:.0f} | {case['error']:+.1%}"
        lines.append(f"| {case['job']} | {dtype} | {tokens} | {manner} | {numbers} |")
    text = (
        f"With freed memory given back, and so without holes, the first takes {returned['measured_mib']:.0f} MiB; "
        f"planned {returned['planned_mib']:.0f}, {returned['error']:+.1%}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(text, 118), ""])


def page() -> str:
    """The whole file, its tables written anew."""
    parts = re.split(f"({BEGIN}|{END})", FILE.read_text(encoding="utf-8"))  # two of the parts are written here
    parts[2], parts[6] = tables(), "\n" + measured() + "\n"
    return "".join(parts)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
