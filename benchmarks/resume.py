"""Does a killed run come back to the same adapter, bit for bit? SIGKILL at random moments and file operations.

    .venv/bin/python benchmarks/resume.py [BASE DATA]

On a tiny Llama: 20 runs killed after a random time, and 20 at a random file operation, one in each twentieth of the
run. With BASE and DATA also 2 of each on that base, in a shorter run. A run that was done before its moment is tried
again at an earlier one. Each is resumed once; all its files must be those of an unbroken run, times left out. The
fork that is killed has everything imported, so the moments fall into the work.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import facts, write

sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent / "tests" / "training")]

from killing import content, killed_after, killed_at, operations_of, start, wait
from tiny_models import build_llama, build_tokenizer, color_rows, write_jsonl

from gora_serve.config import DataConfig, FitConfig, InitConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.training.fit import fit

CONFIG = FitConfig(
    model=ModelConfig(dtype="float32"),
    data=DataConfig(max_length=128, batch_size=2),
    probe=ProbeConfig(steps=4),
    ranks=RankConfig(rank=2),
    init=InitConfig(gamma="auto", search_batches=1),
    train=TrainConfig(steps=12, lr=4e-4, save_every=3, eval_every=6),
)

SHORT = replace(
    CONFIG, probe=ProbeConfig(steps=2), init=InitConfig(gamma=0.1), train=TrainConfig(steps=4, lr=4e-4, save_every=1)
)


@dataclass(frozen=True)
class Case:
    """A base with data, the settings, and the folder to work in."""

    base: Path
    data: Path
    held_out: Path
    work: Path
    config: FitConfig = CONFIG

    def fit(self, run: Path, *, resume: bool = False) -> None:
        fit(str(self.base), str(self.data), run, self.config, eval_data=str(self.held_out), resume=resume)


def stage_of(partial: Path) -> str:
    """How far a killed run had come."""
    checkpoints = sorted(path.name for path in partial.glob("checkpoints/step-*"))
    if (partial / "adapter").exists():
        return "adapter"
    if checkpoints:
        return max(checkpoints, key=lambda name: int(name.partition("-")[2]))
    for name in ("metrics.jsonl", "gamma.json", "ranks.json", "probe", "run.json"):
        if (partial / name).exists():
            return name
    return "nothing"


def try_kill(case: Case, name: str, kill: Callable[[Path, Path], int], unbroken: dict[str, object]) -> dict[str, Any]:
    """Kill a run, resume it in a new process, compare."""
    folder = case.work / name
    folder.mkdir()
    run, log = folder / "run", case.work / f"{name}.log"
    end = kill(folder, log)
    stage = stage_of(folder / "run.partial")
    if end == -signal.SIGKILL and not run.exists():
        assert wait(start(lambda: case.fit(run, resume=True), log=log)) == 0, log.read_text()
    return {"killed": end == -signal.SIGKILL, "left": stage, "same": content(run) == unbroken}


def measure(case: Case, count: int) -> dict[str, Any]:
    whole = case.work / "whole"
    operations = operations_of(lambda: case.fit(whole / "run"), folder=whole, log=case.work / "whole.log")
    unbroken = content(whole / "run")
    began = time.perf_counter()
    assert wait(start(lambda: case.fit(case.work / "again" / "run"), log=case.work / "again.log")) == 0
    seconds = time.perf_counter() - began
    assert content(case.work / "again" / "run") == unbroken
    generator = random.Random(0)
    kinds: dict[str, list[dict[str, Any]]] = {"moments": [], "file operations": []}
    for number in range(count):
        after = generator.uniform(0, seconds)
        for attempt in itertools.count():
            result = try_kill(
                case,
                f"moment-{number}-{attempt}",
                lambda folder, log, after=after: killed_after(after, lambda: case.fit(folder / "run"), log=log),  # type: ignore[misc]
                unbroken,
            )
            if result["killed"]:
                break
            after /= 2
        kinds["moments"].append({"after seconds": round(after, 3), **result})
        at = 1 + int((number + generator.random()) * operations / count)
        result = try_kill(
            case,
            f"operation-{number}",
            lambda folder, log, at=at: killed_at(at, lambda: case.fit(folder / "run"), folder=folder, log=log),  # type: ignore[misc]
            unbroken,
        )
        kinds["file operations"].append({"at": at, **result})
        print(json.dumps({name: found[-1] for name, found in kinds.items()}), file=sys.stderr, flush=True)
    totals = {
        name: f"{sum(one['killed'] and one['same'] for one in found)} of {count}" for name, found in kinds.items()
    }
    return {"same files": totals, "seconds unbroken": round(seconds, 2), "file operations": operations, "points": kinds}


def tiny(work: Path) -> Case:
    base = work / "base"
    build_llama().save_pretrained(base, max_shard_size="100KB")
    build_tokenizer().save_pretrained(base)
    rows = color_rows(48)
    data = write_jsonl(work / "data.jsonl", rows[:40])
    return Case(base, data, write_jsonl(work / "eval.jsonl", rows[40:]), work)


def real(base: Path, data: Path, work: Path) -> Case:
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "data.jsonl").write_text("".join(lines[:64]), encoding="utf-8")
    (work / "eval.jsonl").write_text("".join(lines[64:68]), encoding="utf-8")
    return Case(base, work / "data.jsonl", work / "eval.jsonl", work, SHORT)


def main() -> None:
    torch.set_num_threads(1)
    command = " ".join([".venv/bin/python benchmarks/resume.py", *(["BASE DATA"] if len(sys.argv) > 2 else [])])
    result: dict[str, Any] = facts(command)
    with tempfile.TemporaryDirectory() as work:
        result["tiny Llama"] = measure(tiny(Path(work)), 20)
    write("resume", result)
    if len(sys.argv) > 2:
        with tempfile.TemporaryDirectory() as work:
            result[Path(sys.argv[1]).name] = measure(real(Path(sys.argv[1]), Path(sys.argv[2]), Path(work)), 2)
        write("resume", result)


if __name__ == "__main__":
    main()
