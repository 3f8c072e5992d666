"""The seven tasks: their rows, how an answer is scored, how many tokens it may have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DATA = Path(__file__).parents[1] / "data"
ROWS_AT_ONCE = 150 if torch.cuda.is_available() else 32

Row = dict[str, Any]


def exact(answer: str, row: Row) -> bool:
    return answer.strip() in (row["completion"], *row.get("references", ()))


def same_number(answer: str, row: Row) -> bool:
    """GSM8K: the number after the last ####."""
    return answer.rpartition("####")[2].strip().replace(",", "") == row["answer"] and "####" in answer


def words_shared(answer: str, row: Row) -> float:
    """The F1 of the words that an answer shares with the reference nearest to it (as SQuAD's, Rajpurkar et al. 2016,
    with nothing left out): whole commands are too seldom right, 6 to 9 of 300 in the rows, to tell methods apart."""

    def f1(reference: str) -> float:
        given, wanted = Counter(answer.split()), Counter(reference.split())
        return 2 * (given & wanted).total() / (given.total() + wanted.total())

    return max(map(f1, (row["completion"], *row.get("references", ()))))


@dataclass(frozen=True)
class Task:
    """name: of its folder. longest: tokens of an answer. kind: the paper's group that it stands for. credit: of 0 to 1,
    for an answer to a row. scored: how many test rows are answered at most. at_once: rows of a batch that is only
    evaluated."""

    name: str
    kind: str
    longest: int
    credit: Callable[[str, Row], float] = exact
    scored: int = 300
    at_once: int = 50

    def file(self, split: str) -> Path:
        return DATA / self.name / f"{split}.jsonl"

    def rows(self, split: str, count: int | None = None) -> list[Row]:
        lines = self.file(split).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[:count]]


TASKS = {
    task.name: task
    for task in (
        Task("sentiment", "sentiment, as SST-2", 4),
        Task("acceptability", "acceptability, as CoLA", 4),
        Task("qnli", "QNLI", 4),
        Task("mnli", "MNLI", 8),
        Task("snips", "intents and slots", 72),
        Task("gsm8k", "maths", 200, same_number, scored=150, at_once=25),
        Task("nl2bash", "code", 64, words_shared),
    )
}


@torch.no_grad()
def credits_of(model: nn.Module, tokenizer: Any, task: Task, rows: Sequence[Row]) -> list[float]:
    """Return the credit of each row, answered greedily, in the tokenizer's chat template. Their mean is the score."""
    model.eval()
    tokenizer.padding_side = "left"
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["prompt"]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), ROWS_AT_ONCE):
        places = order[start : start + ROWS_AT_ONCE]
        texts = answers(model, tokenizer, task, [rows[place] for place in places])
        for place, text in zip(places, texts, strict=True):
            found[place] = round(float(task.credit(text, rows[place])), 3)
    return found


def answers(model: nn.Module, tokenizer: Any, task: Task, rows: Sequence[Row]) -> list[str]:
    device = next(model.parameters()).device
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    given = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    ).to(device)
    out = model.generate(  # type: ignore[operator]
        **given, max_new_tokens=task.longest, do_sample=False, pad_token_id=tokenizer.pad_token_id, use_cache=True
    )
    found: list[str] = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return found
