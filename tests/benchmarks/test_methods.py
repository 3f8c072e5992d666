"""How the rows of benchmarks/methods become learning rates, means and differences, by hand-made rows; and its data."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))

from methods import run, tables
from methods.methods import LORA_RATES, methods
from methods.tasks import TASKS, exact, same_number, words_shared

METHODS = methods(run.STEPS)
LORA, GORA = METHODS["lora"], METHODS["gora"]


def valid(method: str, task: str, losses: dict[float, float], device: str = "CPU, x") -> run.Rows:
    shared = {"method": method, "task": task, "seed": run.SWEEP_SEED, "split": "valid", "steps": run.STEPS}
    return [shared | {"lr": lr, "eval_loss": loss, "device": device} for lr, loss in losses.items()]


def row_of(method: str, task: str, seed: int, score: float, device: str = "CPU, x") -> dict[str, Any]:
    return {"method": method, "task": task, "seed": seed, "score": score, "eval_loss": 1 - score, "device": device}


def whole(*losses: float) -> dict[float, float]:
    return dict(zip(LORA_RATES, losses, strict=True))


def test_a_row_of_an_accelerator_stands_for_the_same_of_a_cpu() -> None:
    slow = valid("lora", "snips", {1e-3: 0.2, 2e-3: 0.1})
    (fast,) = valid("lora", "snips", {1e-3: 0.3}, "NVIDIA x")
    assert run.shadowed([*slow, fast]) == [slow[1], fast]


@pytest.mark.parametrize(
    ("losses", "more"),
    [
        (whole(4, 3, 2, 1), (2 * LORA_RATES[-1],)),
        (whole(1, 2, 3, 4), (LORA_RATES[0] / 2,)),
        (whole(4, 1, 2, 3), ()),
        ({LORA_RATES[-1]: 1.0}, ()),  # not whole: nothing is known of its edge
        ({**whole(4, 3, 2, 1), 8e-3: 0.5}, (16e-3,)),
        ({**whole(4, 3, 2, 1), 8e-3: 0.5, 16e-3: 0.4}, ()),  # twice beyond at most
        ({**whole(1, 2, 3, 4), 2.5e-4: 0.5, 1.25e-4: 0.4}, ()),
        ({**whole(4, 3, 2, 1), 8e-3: math.inf}, ()),
    ],
)
def test_a_sweep_goes_on_beyond_the_edge_that_has_its_best(losses: dict[float, float], more: tuple[float]) -> None:
    assert run.beyond(LORA, losses) == more
    (asked,) = run.sweep(valid("lora", "snips", losses), [LORA], ["snips"], run.STEPS)
    assert [row["lr"] for row in asked] == [*LORA_RATES, *more]


def test_the_rate_is_that_of_the_lowest_loss_on_validation_rows() -> None:
    found = valid("lora", "snips", whole(0.3, math.nan, 0.1, 0.2)) + valid("gora", "snips", {9.0: 0.0})
    found += [row | {"split": "test", "lr": 7.0, "eval_loss": 0.0} for row in found[:1]]
    assert run.best_rate(found, LORA, "snips", run.STEPS) == LORA_RATES[2]
    assert run.tried(found, LORA, "snips", run.STEPS)[LORA_RATES[1]] == math.inf
    assert run.best_rate(found, GORA, "snips", run.STEPS) is None, "its sweep is not whole"
    assert run.best_rate(found, METHODS["gora-sketch"], "snips", run.STEPS) is None, "a variant takes GoRA's"


def test_a_task_without_a_sweep_takes_the_rate_that_is_best_over_the_others() -> None:
    """Losses count by how far they are above the task's own lowest: 1.5 + 1.0 < 1.0 + 3.0 < 2.0 + 2.0."""
    found = valid("lora", "snips", whole(0.1, 0.15, 0.2, 9)) + valid("lora", "mnli", whole(3, 1, 2, 9))
    assert run.best_rate(found, LORA, "qnli", run.STEPS) == LORA_RATES[1]
    assert not tables.swept_whole("lora", "qnli", found)
    found += valid("lora", "qnli", {LORA_RATES[0]: 0.0})
    assert run.best_rate(found, LORA, "qnli", run.STEPS) == LORA_RATES[1], "a part of a sweep says nothing"


def test_differences_are_of_the_same_seed_and_device() -> None:
    rows = [
        row_of("lora", "snips", 0, 0.5), row_of("gora", "snips", 0, 0.6),
        row_of("lora", "snips", 1, 0.5), row_of("gora", "snips", 1, 0.8),
        row_of("lora", "snips", 2, 0.1, "NVIDIA x"), row_of("gora", "snips", 2, 0.9),  # no pair
        row_of("lora", "mnli", 0, 0.7), row_of("gora", "mnli", 0, 0.6),
        row_of("gora-32", "mnli", 0, 0.9), row_of("lora-32", "mnli", 0, 0.8),
    ]  # fmt: skip
    found = tables.paired(rows, "gora", "lora", "score")
    assert found is not None
    # snips: +0.1 and +0.3, so 0.2 with an error of 0.1414 / sqrt(2); mnli: -0.1; in the mean 0.05
    # Student's t of one degree of freedom, a Cauchy variable: tan(0.475 pi) = 12.706
    snips = {"mean": 0.2, "error": 0.1, "interval": [-1.071, 1.471], "count": 2, "of seeds": [0.1, 0.3]}
    snips |= {"error over rows": None}  # credits were not stored
    assert found["by task"]["snips"] == snips
    alone = {"error": None, "interval": None, "count": 1, "error over rows": None}
    assert found["by task"]["mnli"] == alone | {"mean": -0.1, "of seeds": [-0.1]}
    assert (found["mean"], found["error"], found["count"], found["better on"]) == (0.05, 0.15, 2, 1)
    losses = tables.paired(rows, "gora", "lora", "eval_loss")
    assert losses is not None
    assert (losses["mean"], losses["better on"]) == (-0.05, 1)
    large = tables.paired(rows, "gora-32", "lora", "score")
    assert large is not None
    assert large["mean"] == 0.1
    assert tables.paired(rows, "lora", "lora", "score") is None
    mirrored = tables.paired(rows, "lora", "gora", "score")
    assert mirrored is not None
    assert mirrored["mean"] == -0.05
    assert tables.paired(rows[:1], "gora", "lora", "score") is None


def test_the_error_over_rows_is_that_of_their_mean_over_seeds() -> None:
    credits = {"lora": [[0, 0, 1], [0, 1, 1]], "gora": [[1, 0, 1], [1, 1, 1]]}
    rows = [
        row_of(method, "snips", seed, 0.5) | {"credits": of_seed}
        for method, of_seeds in credits.items() for seed, of_seed in enumerate(of_seeds)
    ]  # fmt: skip
    found = tables.paired(rows, "gora", "lora", "score")
    assert found is not None
    # of the rows: 1, 0, 0; their deviation sqrt(1/3), over sqrt(3)
    assert found["by task"]["snips"]["error over rows"] == 0.3333


def test_a_mean_is_of_one_kind_of_device() -> None:
    slow = [row_of("lora", "snips", seed, 0.5) for seed in (0, 1)]
    fast = [row_of("lora", "snips", seed, 0.6, "NVIDIA x") for seed in (0, 1, 2)]
    assert tables.of_one_device([*slow, *fast[:1]]) == slow
    assert tables.of_one_device([*slow, *fast[:2]]) == fast[:2]
    other = row_of("lora", "mnli", 0, 0.7)
    assert tables.of_one_device([other, *slow, *fast]) == [other, *fast]


def test_bytes_of_many_tasks() -> None:
    """A method that edits the base has a base for each task as trained; converted, or by GoRA, all share one."""
    sizes = {"base_bytes": 100 * 10**6, "trained_bytes": 10**6, "converted_bytes": 2 * 10**6}
    rows = [{"method": name, "steps": run.STEPS, "served": sizes} for name in ("pissa", "gora")]
    made = tables.deployed([*rows, {"method": "lora", "steps": run.STEPS, "served": False}])
    assert made["pissa"] == {"as trained": {1: 101, 10: 1010, 100: 10100}, "on one base": {1: 102, 10: 120, 100: 300}}
    assert made["gora"] == {"as trained": {1: 101, 10: 110, 100: 200}, "on one base": {1: 101, 10: 110, 100: 200}}


class Asked:
    """A worker that answers at once: no training."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def ask(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self.rates.append(wanted["lr"])
        failed = {"error": "of memory"}
        return failed if wanted["lr"] == 3 else wanted | {"score": None, "eval_loss": 1.0, "device": "CPU, x"}


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    file, worker = tmp_path / "rows.jsonl", Asked()
    wanted = [
        {"method": "lora", "task": "snips", "seed": 0, "lr": lr, "split": "valid", "steps": 1} for lr in (1, 2, 3, 4)
    ]
    run.make([worker], [wanted[:2]], file, math.inf)  # type: ignore[list-item]
    run.make([worker], [wanted], file, math.inf)  # type: ignore[list-item]
    run.make([worker], [wanted], file, -math.inf)  # type: ignore[list-item]
    assert worker.rates == [1, 2, 3, 4]
    assert [row["lr"] for row in run.all_rows(file)] == [1, 2, 4], "what failed is made again another time"


def test_every_method_has_a_sweep_of_the_same_size() -> None:
    assert {len(method.rates) for method in METHODS.values()} == {4}
    assert all(method.like in METHODS for method in METHODS.values() if method.like)


def test_answers_that_are_right() -> None:
    assert exact(" yes\n", {"completion": "yes"})
    assert not exact("yes.", {"completion": "yes"})
    assert exact("ls", {"completion": "ls -a", "references": ["ls", "dir"]})
    assert same_number("6 * 7 = 42\n#### 1,042", {"answer": "1042"})
    assert not same_number("1042", {"answer": "1042"})
    assert not same_number("#### 1042\n#### 7", {"answer": "1042"})


def test_words_that_are_shared() -> None:
    row = {"completion": "find . -name a", "references": ["ls -a"]}
    assert words_shared("find . -name a\n", row) == 1.0
    assert words_shared("ls", row) == pytest.approx(2 / 3)  # of the nearer one
    assert words_shared("find find .", row) == pytest.approx(4 / 7)  # a word counts as often as it is in both
    assert words_shared("", row) == 0.0


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_no_prompt_is_in_two_splits(task: Any) -> None:
    prompts = [{row["prompt"] for row in task.rows(split)} for split in ("train", "valid", "test")]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert len(prompts[0]) > 900
    assert len(prompts[1]) >= run.SWEEP_ROWS * 0.9


def test_the_page_is_made_of_the_rows() -> None:
    every = run.all_rows()
    keys = [(run.key(row), run.on_cpu(row)) for row in every]
    assert len(keys) == len(set(keys)), "a row was made twice"
    _, _, made = tables.PAGE.read_text(encoding="utf-8").partition(tables.BEGIN)
    value = tables.results([row for row in every if row["steps"] == run.STEPS])
    assert made.strip() == tables.markdown(value).strip(), "run: python benchmarks/methods/tables.py"
