"""What an answer costs that does not look at the row: results/guessing.json, for tasks of a few answers.

    python benchmarks/methods/guessing.py BASE

Loss of guessing: every answer gets the probability of its share among the rows themselves, so that no guess without the
row does better. Score: the most frequent answer of the training rows. BASE gives the tokenizer and the chat template.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import facts, write

from gora_serve.training.encode import IGNORED
from methods.bench import Bench
from methods.run import SWEEP_ROWS
from methods.tasks import TASKS, Task

FEW = 10  # answers


def guessing(bench: Bench, task: Task, split: str) -> dict[str, Any]:
    """Return what guessing gives on the rows that a split is judged by: the loss of a token, and the score."""
    count = SWEEP_ROWS if split == "valid" else task.scored
    answers = Counter(row["completion"] for row in task.rows(split, count))
    examples = bench.rows(task.name, split).examples[:count]
    tokens = sum(label != IGNORED for example in examples for label in example.labels[1:])
    entropy = -sum(n * math.log(n / answers.total()) for n in answers.values())  # nats of all rows
    ((usual, _),) = Counter(row["completion"] for row in task.rows("train")).most_common(1)
    return {
        "rows": answers.total(), "tokens": tokens, "loss": round(entropy / tokens, 4),
        "score": round(answers[usual] / answers.total(), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    bench = Bench(parser.parse_args().base)
    few = [task for task in TASKS.values() if len({row["completion"] for row in task.rows("train")}) <= FEW]
    value = {task.name: {split: guessing(bench, task, split) for split in ("valid", "test")} for task in few}
    write("guessing", facts("python benchmarks/methods/guessing.py BASE") | {"tasks": value})


if __name__ == "__main__":
    main()
