"""How near does a sketch come to the exact probe? Importance, ranks and B on a real base and three tasks.

    .venv/bin/python benchmarks/sketch.py gora-demo/base

For each task of examples/data the same micro-batches are probed in sketch mode and in exact mode, and in exact mode
by two disjoint halves: how much they differ is how much the data itself leaves open. And once more in exact mode with
the products of a micro-batch in float32, which the exact probe has in the dtype of the forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import facts, write

from gora_serve.config import DataConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.gora import statistics
from gora_serve.gora.initialize import initialize
from gora_serve.gora.ranks import allocate_ranks
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.progress import silent
from gora_serve.training.data import schedule
from gora_serve.training.loss import mean_loss
from gora_serve.training.probe import probe
from gora_serve.training.session import Session, open_session

DATA = Path(__file__).parent.parent / "examples" / "data"
TASKS = ("banking", "gsm8k", "requests")
STEPS, ROWS = 16, 4
SETTINGS = {"steps": STEPS, "rows": ROWS, "max_length": 256, "dtype": "auto (bfloat16)", "targets": "all-linear"}


def measure(session: Session, batches: list[Any], mode: str) -> GradientStatistics:
    return probe(
        session.model,
        (batch() for batch in batches),
        mean_loss,
        modules=session.modules,
        generator=torch.Generator().manual_seed(0),
        config=ProbeConfig(steps=len(batches), mode=mode),  # type: ignore[arg-type]
    )


@contextmanager
def products_in_float32() -> Iterator[None]:
    """While open, an exact probe multiplies in float32, whatever the forward pass is in."""
    own = statistics.operands
    statistics.operands = lambda dY, X: tuple(one.float() for one in own(dY, X))  # type: ignore[assignment]
    try:
        yield
    finally:
        statistics.operands = own


def compare(exact: GradientStatistics, other: GradientStatistics) -> dict[str, float]:
    """Relative change of the importances, and of the ranks that follow, from `exact` to `other`."""
    before, after = exact.importances("sensitivity"), other.importances("sensitivity")
    errors = np.array([abs(after[path] / before[path] - 1) for path in before])
    one, two = (allocate_ranks(values, exact.shapes, RankConfig()).ranks for values in (before, after))
    off = np.array([abs(one[path] - two[path]) for path in one])
    return {
        "median error": round(float(np.median(errors)), 7),
        "95th percentile": round(float(np.quantile(errors, 0.95)), 7),
        "largest error": round(float(errors.max()), 7),
        "share of equal ranks": round(float((off == 0).mean()), 4),
        "largest rank difference": int(off.max()),
    }


def largest_difference_of_b(exact: GradientStatistics, sketch: GradientStatistics) -> float:
    worst = 0.0
    for path, module in exact.modules.items():
        other = sketch.modules[path]
        _, expected = initialize(module.A, module.compressed, rank=8, gamma=0.05, alpha=16.0)
        _, found = initialize(other.A, other.compressed, rank=8, gamma=0.05, alpha=16.0)
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def one_task(base: str, task: str) -> dict[str, Any]:
    session = open_session(
        base, str(DATA / task / "train.jsonl"), model=ModelConfig(),
        rows=DataConfig(batch_size=ROWS, max_length=256), train=TrainConfig(), listen=silent,
    )  # fmt: skip
    examples = session.data.examples
    batches = session.batches(examples, schedule(len(examples), ROWS, batches=STEPS, seed=42))
    sketch = measure(session, batches, "sketch")
    exact = measure(session, batches, "exact")
    with products_in_float32():
        precise = measure(session, batches, "exact")
    halves = [measure(session, batches[start::2], "exact") for start in (0, 1)]
    modules = sketch.modules.values()
    rows = sum(module.rows or 0 for module in modules) / sum(module.shape[0] for module in modules)
    errors = [module.importance_error for module in modules]
    return {
        "sketch against exact": compare(exact, sketch),
        "products in bfloat16 against float32": compare(precise, exact)
        | {"largest relative difference of B": largest_difference_of_b(precise, exact)},
        "one half of the data against the other": compare(*halves),
        "share of rows sampled": round(rows, 4),
        "stated error": ProbeConfig.error,
        "median standard error": round(float(np.median(errors)), 5),
        "largest standard error": round(max(errors), 5),
        "largest relative difference of B": largest_difference_of_b(exact, sketch),
    }


def main() -> None:
    base = sys.argv[1] if len(sys.argv) > 1 else "gora-demo/base"
    result = facts("make demo && .venv/bin/python benchmarks/sketch.py gora-demo/base") | {"settings": SETTINGS}
    result["tasks"] = {}
    for task in TASKS:
        result["tasks"][task] = one_task(base, task)
        print(task, result["tasks"][task], flush=True)
    write("sketch", result)


if __name__ == "__main__":
    main()
