"""What a merge into a model costs: against copying the base, and against PEFT's load, merge_and_unload and save.

    python benchmarks/merge.py

A base of TinyLlama-1.1B's shapes with random weights in bfloat16, 2.2 GB in 5 files, and an adapter of rank 16 on all
its linear layers. All contenders in one run, one after the other, each in a process of its own, the disk idle before
each; the base's files lie in the page cache, as after a download. Our output is on disk when the command ends, as that
of `cp -r` and `sync` is; `cp -r` alone and PEFT leave theirs in the page cache. Then the same merge on a base three
times as large (6.6 GB), for its memory. Needs 25 GB of disk.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts, write
from safetensors.torch import save_file

from gora_serve.integrity.headers import encode_header

HIDDEN, INNER, KEYS, VOCABULARY, RANK = 2048, 5632, 256, 32000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
LAYERS, MANY_LAYERS, SHARDS = 22, 72, 5
ROUNDS = 3
CHILD = """
import sys
from gora_serve.cli.main import main
code = main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
sys.exit(code)
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(output, max_shard_size="500MB")
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
"""


def make_base(folder: Path, layers: int) -> None:
    """Write a Llama with random weights in bfloat16; all layers have the same."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {*LINEARS.values(), (VOCABULARY, HIDDEN), (HIDDEN,)}
    data = {shape: bytes_of(torch.randn(shape, generator=generator) * 0.02) for shape in sorted(shapes)}
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        names |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        names |= {f"model.layers.{layer}.{name}.weight": (HIDDEN,) for name in norms}
    names |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    total, placed, shards = sum(len(data[shape]) for shape in names.values()), {}, [[] for _ in range(SHARDS)]  # type: ignore[var-annotated]
    seen = 0
    for name, shape in names.items():
        shards[min(SHARDS - 1, seen * SHARDS // total)].append((name, "BF16", shape))
        seen += len(data[shape])
    for index, layout in enumerate(shards):
        file = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(encode_header(layout, {"format": "pt"}))
            for name, _, shape in layout:
                stream.write(data[shape])
                placed[name] = file
    value = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def bytes_of(values: torch.Tensor) -> bytes:
    buffer = bytearray(2 * values.numel())
    torch.frombuffer(buffer, dtype=torch.bfloat16).copy_(values.flatten())
    return bytes(buffer)


def make_adapter(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(layers):
        for name, (out, width) in LINEARS.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(RANK, width, generator=generator) * 0.02
            tensors[f"{key}B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "init_lora_weights": True, "bias": "none",
              "target_modules": [name.rpartition(".")[2] for name in LINEARS], "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def timed(words: list[str], output: Path) -> tuple[float, float | None]:
    """Run a command that writes `output`; return seconds and its peak resident memory in MB, where it tells."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    start = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    peak = done.stderr.rpartition("VmHWM:")[2].split()
    return seconds, int(peak[0]) * 1024 / 1e6 if peak else None


def contenders(base: Path, adapter: Path, output: Path) -> dict[str, list[str]]:
    copy = f"cp -r {shlex.quote(str(base))} {shlex.quote(str(output))}"
    return {
        "cp -r and sync": ["sh", "-c", f"{copy} && sync {shlex.quote(str(output))}/*"],
        "cp -r": ["cp", "-r", str(base), str(output)],
        "gora-serve merge": [
            sys.executable, "-c", CHILD, "merge", str(base), "-a", str(adapter), "--output", str(output), "--json"],
        "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(output)],
    }  # fmt: skip


def compare(place: Path, rounds: int) -> dict[str, Any]:
    base, adapter = place / "base", place / "adapter"
    found: dict[str, list[tuple[float, float | None]]] = {}
    for _ in range(rounds):
        for name, words in contenders(base, adapter, place / "output").items():
            found.setdefault(name, []).append(timed(words, place / "output"))
    value: dict[str, Any] = {}
    for name, runs in found.items():
        seconds = [one for one, _ in runs]
        peaks = [peak for _, peak in runs if peak is not None]
        value[name] = {"seconds": round(statistics.median(seconds), 2), "all": [round(one, 2) for one in seconds],
                       **({"peak_resident_MB": round(max(peaks))} if peaks else {})}  # fmt: skip
    ours = value["gora-serve merge"]["seconds"]
    for name in ("cp -r", "cp -r and sync"):
        value[f"times {name}"] = round(ours / value[name]["seconds"], 2)
    value["times faster than peft"] = round(value["peft"]["seconds"] / ours, 2)
    return value


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="merge-", dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        load = [round(one, 2) for one in os.getloadavg()]
        make_base(place / "base", LAYERS)
        make_adapter(place / "adapter", LAYERS)
        size = sum(file.stat().st_size for file in (place / "base").iterdir())
        result: dict[str, Any] = {"base_GB": round(size / 1e9, 2), **compare(place, ROUNDS)}
        check = ["verify", str(place / "output"), "--base", str(place / "base"), "-a", str(place / "adapter"), "--json"]
        done = subprocess.run([sys.executable, "-m", "gora_serve", *check], capture_output=True, text=True, check=False)
        result["verify of PEFT's output"] = json.loads(done.stdout)["counts"]
        shutil.rmtree(place / "output")
        shutil.rmtree(place / "base")
        shutil.rmtree(place / "adapter")
        make_base(place / "base", MANY_LAYERS)
        make_adapter(place / "adapter", MANY_LAYERS)
        size = sum(file.stat().st_size for file in (place / "base").iterdir())
        seconds, peak = timed(contenders(place / "base", place / "adapter", place / "output")["gora-serve merge"],
                              place / "output")  # fmt: skip
        result["three times as large"] = {
            "base_GB": round(size / 1e9, 2),
            "seconds": round(seconds, 1),
            "peak_resident_MB": round(peak or 0),
        }
        write("merge", facts("python benchmarks/merge.py") | {"load before": load} | result)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
