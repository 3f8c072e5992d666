"""Is every answer that of its own adapter, while adapters come, change and go, and broken ones are dropped in?

    .venv/bin/python benchmarks/live.py BASE [--requests N] [--workers N]

`gora-serve serve BASE --adapters DIR` with eight adapters of ranks 2 to 16 (random factors, of q_proj, v_proj and
down_proj of every layer) and the base, in float32. Clients ask all of them in turn, some at a time. Meanwhile the whole
corpus of broken adapters is dropped into the directory, two adapters are replaced by new versions, and one is removed.
Each answer's log probabilities are compared with PEFT's, in float32, for the version that could have answered; and with
those of another adapter, to show that the comparison can tell them apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

from machine import facts, write
from serving.corpus import CORPUS, write_sound
from serving.traffic import Asked, Running, Traffic, Version, distances, serving

from gora_serve.integrity.headers import read_header
from gora_serve.serving.client import list_models

RANKS = (2, 3, 4, 6, 8, 10, 12, 16)
ENDS = ("q_proj", "v_proj", "down_proj")
STEPS = 4
REPLACED, REMOVED = ("t1", "t5"), "t7"
TEXTS = (
    "The capital of France is", "Water boils at one hundred degrees Celsius, and it freezes at", "def add(a, b):",
    "Question: which day comes after Monday?\nAnswer:", "Dear colleagues, thank you for", "Play some quiet jazz in the",
    "Once upon a time there was a small village at the foot of a mountain, where every winter", "The three colors are",
)  # fmt: skip


def make_adapters(base: Path, made: Path) -> None:
    header = read_header(base / "model.safetensors")
    shapes: Any = {n.removesuffix(".weight"): e.shape for n, e in header.entries.items() if n[:-7].endswith(ENDS)}
    for seed, rank in enumerate(RANKS):
        write_sound(made / f"t{seed}", shapes, seed=seed, rank=rank)
    for seed, name in enumerate(REPLACED):
        write_sound(made / f"{name}-new", shapes, seed=100 + seed, rank=RANKS[int(name[1:])])


def replace(made: Path, live: Path, name: str) -> float:
    """Put the new version in the old one's place by two renames; return the time before."""
    begun = time.monotonic()
    shutil.copytree(made / f"{name}-new", live / ".next")
    (live / name).rename(live / ".last")
    (live / ".next").rename(live / name)
    shutil.rmtree(live / ".last")
    return begun


def drive(server: Running, made: Path, live: Path, prompts: list[Any], count: int, workers: int) -> dict[str, Any]:
    """Ask, and change the directory meanwhile; return what was asked and seen."""
    names = [f"t{index}" for index in range(len(RANKS))]
    versions = {"base": [Version(None)]} | {name: [Version(name)] for name in names}
    seen: dict[str, Any] = {}
    begun = time.monotonic()
    with Traffic(server.url, ["base", *names], prompts, workers=workers, steps=STEPS, most=count) as traffic:
        traffic.after(workers)
        for index, row in enumerate(CORPUS):
            row.build(made / "t2", live / f"broken-{index}")
        traffic.after(workers)
        for number, name in enumerate(REPLACED, start=1):
            since = replace(made, live, name)
            until = server.wait(f"a new version is served: {name}")
            versions[name] = [Version(name, 0.0, until), Version(f"{name}-new", since)]
            seen[f"seconds from dropping version {number} to serving it"] = round(until - since, 1)
            seen[f"requests answered when version {number} was served"] = len(traffic.asked)
            traffic.after(workers)
        with traffic._lock:
            traffic.models.remove(REMOVED)
        traffic.after(workers)
        since = time.monotonic()
        shutil.rmtree(live / REMOVED)
        seen["seconds from removing to unloading it"] = round(server.wait(f"unloaded: {REMOVED},") - since, 1)
        seen["requests answered when it was unloaded"] = len(traffic.asked)
        traffic.wait()
    seen["seconds"] = round(time.monotonic() - begun, 1)
    server.wait("unloaded: ", 1 + len(REPLACED))
    return {"asked": traffic.asked, "versions": versions, "seen": seen}


def refusals(server: Running) -> int:
    """Return how many of the corpus were refused by their own code, and say which were not."""
    right = 0
    for index, row in enumerate(CORPUS):
        server.wait(f"refused: broken-{index}:")
        lines = server.lines(f"refused: broken-{index}:")
        fits = len(lines) == 1 and row.code in lines[0] and all(text in lines[0] for text in row.told)
        right += fits
        if not fits:
            print(row.name, lines, flush=True)
    return right


def compare(base: Path, made: Path, asked: list[Asked], versions: dict[str, list[Version]]) -> dict[str, Any]:
    import torch

    from gora_serve.training.reference import Reference

    names = [f"t{index}" for index in range(len(RANKS))] + [f"{name}-new" for name in REPLACED]
    reference = Reference(base, {name: made / name for name in names}, torch.float32)
    answered = [one for one in asked if one.answer is not None]
    found = distances(answered, versions, reference.logprobs)
    others = {name: [Version("t0" if name != "t0" else "t2")] for name in versions}
    crossed = distances([one for one in answered if len(one.prompt) < 6], others, reference.logprobs)
    count = sum(len(step) for one in answered if one.answer for step in one.answer.top)
    return {
        "answers": len(answered), "log probabilities": count, "largest difference": float(f"{max(found):.2g}"),
        "by model": {
            name: float(f"{max(d for d, one in zip(found, answered, strict=True) if one.model == name):.2g}")
            for name in versions
        },
        "smallest difference to another adapter, of short prompts": float(f"{min(crossed):.2g}"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--workers", type=int, default=16)
    chosen = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    load = round(os.getloadavg()[0], 1)  # of the machine's other work
    with tempfile.TemporaryDirectory(prefix="gora-live-") as place:
        folder = Path(place)
        made, live = folder / "made", folder / "adapters"
        make_adapters(chosen.base, made)
        live.mkdir()
        for index in range(len(RANKS)):
            shutil.copytree(made / f"t{index}", live / f"t{index}")
        words = ("--adapters", str(live), "--store", str(folder / "store"), "--max-rank", "16")
        with serving(chosen.base, folder, *words, "--", "--lora-target-modules", *ENDS) as server:
            begun = time.monotonic()
            server.wait("ready:")
            start = time.monotonic() - begun
            told = drive(server, made, live, prompts, chosen.requests, chosen.workers)
            right = refusals(server)
            listed = sorted(list_models(server.url))
        compared = compare(chosen.base, made, told["asked"], told["versions"])
    result = facts(" ".join(["benchmarks/live.py", "BASE", f"--requests {chosen.requests}"])) | {
        "load average before": load,
        "base": chosen.base.resolve().name, "dtype": "float32", "ranks": RANKS, "at a time": chosen.workers,
        "tokens of an answer": STEPS, "seconds until ready, eight adapters": round(start, 1),
        "requests": len(told["asked"]), "failed": sum(one.error is not None for one in told["asked"]),
        "errors": sorted({one.error for one in told["asked"] if one.error}), **told["seen"],
        "broken adapters dropped in": len(CORPUS), "refused by their own message": right,
        "listed at the end": listed, "compared with PEFT": compared,
    }  # fmt: skip
    write("live", result)


if __name__ == "__main__":
    main()
