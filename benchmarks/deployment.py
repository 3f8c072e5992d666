"""What N tasks take to serve: N bases, as unconverted PiSSA-style checkpoints need them, against one with N adapters.

    .venv/bin/python benchmarks/deployment.py BASE

Each of N servers gets a base of its own (a copy of BASE: an edited base differs from it in values alone) and its own
adapter; the one server gets BASE and N adapters. All N servers run at the same time when memory is read: the
proportional set size of every process of a server, with 1 GiB of KV cache for each server. Start-up is from the command
to readiness, canaries included, one server after the other. Adapters have ranks 2 to 16 on all linear layers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]

from machine import facts, write
from serving.corpus import write_sound

from gora_serve.config import ServeConfig
from gora_serve.integrity.headers import read_header
from gora_serve.serving.engine import free_port, running_server
from gora_serve.serving.start import prepare

RANKS = (2, 4, 8, 16)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def serve(stack: ExitStack, base: Path, adapters: dict[str, Path], place: Path) -> tuple[int, float]:
    """Start a server; return the process that leads its session, and the seconds until it was ready."""
    begun = time.monotonic()
    config = ServeConfig(port=free_port(), dtype="bfloat16", max_model_len=512, store=place / "store")
    plan, _ = prepare(str(base), list(adapters.items()), config)
    server = stack.enter_context(running_server(plan, log=place / f"{config.port}.log"))
    return server.pid, time.monotonic() - begun


def memory(leader: int) -> int:
    """Return the proportional set size in bytes of all processes of the session: what is shared counts in shares."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == leader:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
        except (OSError, StopIteration):  # it ended meanwhile
            continue
    return total


def measure(jobs: list[tuple[Path, dict[str, Path]]], place: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        started = [serve(stack, base, adapters, place) for base, adapters in jobs]
        time.sleep(5)
        sizes = [memory(leader) for leader, _ in started]
    return {
        "servers": len(jobs),
        "GB": round(sum(sizes) / 1e9, 2),
        "seconds until all are ready": round(sum(seconds for _, seconds in started), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    base = parser.parse_args().base.resolve()
    header = read_header(base / "model.safetensors")
    shapes: Any = {n.removesuffix(".weight"): e.shape for n, e in header.entries.items() if n[:-7].endswith(LINEAR)}
    place = Path(tempfile.mkdtemp(prefix="deployment-"))
    try:
        for seed, rank in enumerate(RANKS):
            write_sound(place / f"t{seed}", shapes, seed=seed, rank=rank)
            shutil.copytree(base, place / f"base-{seed}")
        result: dict[str, Any] = {}
        for count in (1, 2, 4):
            names = [f"t{index}" for index in range(count)]
            many = [(place / f"base-{index}", {name: place / name}) for index, name in enumerate(names)]
            result[f"{count} tasks"] = {
                "a base for each": measure(many, place),
                "one base": measure([(base, {name: place / name for name in names})], place),
            }
            print(count, result[f"{count} tasks"], flush=True)
        write("deployment", facts("benchmarks/deployment.py BASE") | {"dtype": "bfloat16", "tasks": result})
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
