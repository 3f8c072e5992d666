"""The seven tasks: their rows, how an answer is scored, how many tokens it may have."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Task:
    """name: of its folder. longest: tokens of an answer. kind: the paper's group that it stands for. scored: how many
    test rows are answered at most. at_once: rows of a batch that is only evaluated."""

    name: str
    kind: str
    longest: int
    right: Callable[[str, Row], bool] = exact
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
        Task("nl2bash", "code", 64),
    )
}


@torch.no_grad()
def score(model: nn.Module, tokenizer: Any, task: Task, rows: Sequence[Row]) -> float:
    """Return the share of rows that the model answers right, greedily, in the tokenizer's chat template."""
    model.eval()
    tokenizer.padding_side = "left"
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["prompt"]))
    hits = 0
    for start in range(0, len(order), ROWS_AT_ONCE):
        some = [rows[place] for place in order[start : start + ROWS_AT_ONCE]]
        hits += sum(
            task.right(text, row) for text, row in zip(answers(model, tokenizer, task, some), some, strict=True)
        )
    return hits / len(rows)


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
