"""A base of the shape of Llama-3.1-8B with random weights, through the whole of `fit`, on one accelerator.

    python benchmarks/large.py FOLDER TOKENIZER DATA [--offload none cpu] [--probe sketch exact]

FOLDER gets the base (16 GB) and the runs; TOKENIZER is a base's folder whose tokenizer is taken, of fewer tokens.
Writes results/large.json: seconds of each stage, peak memory, and that the base's digests are what they were.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import facts, write

STEPS, BATCH, LENGTH = 8, 4, 512


def make_base(folder: Path, tokenizer: str) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
        vocab_size=128256, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def fit(base: Path, data: str, output: Path, offload: str, mode: str) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "gora_serve", "fit", str(base), "--data", data, "--output", str(output),
        "--offload", offload, "--probe", mode, "--steps", str(STEPS), "--probe-steps", str(STEPS),
        "--batch-size", str(BATCH), "--max-length", str(LENGTH), "--gradient-checkpointing",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {"seconds of the whole command": round(time.perf_counter() - began, 1), "run": record}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("data")
    parser.add_argument("--offload", nargs="*", default=["none", "cpu"])
    parser.add_argument("--probe", nargs="*", default=["sketch", "exact"])
    asked = parser.parse_args()
    began = time.perf_counter()
    base = make_base(asked.folder / "base", asked.tokenizer)
    print(f"the base is there after {time.perf_counter() - began:.1f} s", flush=True)
    result = facts("python benchmarks/large.py FOLDER TOKENIZER DATA")
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for offload in asked.offload:
        for mode in asked.probe:
            name = f"--offload {offload} --probe {mode}"
            result[name] = fit(base, asked.data, asked.folder / f"{offload}-{mode}", offload, mode)
            print(name, json.dumps(result[name])[:1500], flush=True)
            write("large", result)


if __name__ == "__main__":
    main()
