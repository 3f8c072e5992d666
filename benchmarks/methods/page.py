"""docs/methods.md's tables in Markdown, of the values that tables.py makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from methods.methods import methods
from methods.run import STEPS, beyond, is_whole
from methods.tasks import TASKS

Rows = Sequence[dict[str, Any]]
OF_PAIRS = (
    "On tasks with sweeps of their own: the method's less the other's, of the same seed and device (of `-32` less "
    "`-32`), with the standard error over seeds and the interval that holds the mean with 95 % (Student's t); the "
    "standard error over test rows, where the credit of each was stored; in the mean over tasks."
)


def sweep(losses: dict[str, dict[str, dict[str, float]]], chance: dict[str, Any]) -> str:
    """One table a task: methods by their lowest loss, with all rates that were tried, the lowest in bold; above it what
    guessing gives, where a task has few answers.

    A method that lacks some of its rates comes after those that have all, and is marked; so is one whose best rate is
    the last that was tried, where more was to be tried.
    """
    every = methods(STEPS)

    def lacks(name: str, at: dict[str, float]) -> bool:
        return not is_whole(every[name], map(float, at))

    parts = []
    for task, of_task in losses.items():
        guess = f" (guessing: {chance[task]['valid']['loss']:.4f})" if task in chance else ""
        lines = [f"**{task}**{guess}\n", "| method | lowest loss | tried: rate, loss |", "| --- | --- | --- |"]
        for name, at in sorted(of_task.items(), key=lambda one: (lacks(*one), min(one[1].values()))):
            least = min(at.values())
            shown = [f"**{lr}** {loss:.4f}" if loss == least else f"{lr} {loss:.4f}" for lr, loss in at.items()]
            numbers = {float(lr): loss for lr, loss in at.items()}
            edge = " (its best at an edge)" if beyond(every[name], numbers) else ""
            mark = " (not whole)" if lacks(name, at) else edge
            lines.append(f"| {name}{mark} | {least:.4f} | {', '.join(shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def twice(both: Sequence[dict[str, Any]]) -> str:
    lines = ["| method | task | rate | loss, accelerator | loss, CPU |", "| --- " * 5 + "|"]
    for row in both:
        lines.append(f"| {row['method']} | {row['task']} | {row['lr']:g} | {row['accelerator']} | {row['CPU']} |")
    return "\n".join(lines)


def test(value: dict[str, Any], chance: dict[str, Any]) -> str:
    """Methods by tasks, each cell: score ± deviation, loss (how many seeds; the learning rate). First what guessing
    gives, where a task has few answers."""
    tasks = [task for task in TASKS if any(task in one["tasks"] for one in value.values())]
    lines = ["| method | parameters | " + " | ".join(tasks) + " |", "| --- " * (len(tasks) + 2) + "|"]
    guesses = {task: f"{one['test']['score']:.3f}, {one['test']['loss']:.4f}" for task, one in chance.items()}
    lines.append("| guessing | 0 | " + " | ".join(guesses.get(task, "") for task in tasks) + " |")
    for name, one in value.items():
        cells = [told(one["tasks"].get(task)) for task in tasks]
        lines.append(f"| {name} | {one['parameters'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    score, loss = cell["score"], cell["eval_loss"]
    mark = "" if cell["swept"] else "*"
    spread_of = f" ± {score['deviation']:.3f}" if score["deviation"] is not None else ""
    place = ", GPU" if cell["accelerator"] else ""
    return f"{score['mean']:.3f}{spread_of}, {loss['mean']:.4f} ({score['rows']}; {cell['lr']:g}{mark}{place})"


def against(value: dict[str, Any], rival: str) -> str:
    """The paired differences from the rival, for each task and over all that there are."""
    heads = ("method", "task", "score", "95 % of it", "over rows", "loss", "score of each seed")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, one in value.items():
        score, loss = one["against"][rival]["score"], one["against"][rival]["loss"]
        if score is None:
            continue
        for task, of_task in score["by task"].items():
            each = ", ".join(f"{one:+.3f}" for one in of_task["of seeds"])
            over_rows = of_task["error over rows"]
            rows = "" if over_rows is None else f"± {over_rows:.4f}"
            cells = (difference(of_task), interval(of_task), rows, difference(loss["by task"][task]), each)
            lines.append(f"| {name} | {task} | {' | '.join(cells)} |")
        if score["count"] > 1:
            cells = f"{difference(score)} | {interval(score)} | | {difference(loss)} |"
            lines.append(f"| {name} | mean of {score['count']} | {cells} |")
    return "\n".join(lines)


def difference(one: dict[str, Any]) -> str:
    return f"{one['mean']:+.4f}" + (f" ± {one['error']:.4f}" if one["error"] is not None else "")


def interval(one: dict[str, Any]) -> str:
    return f"{one['interval'][0]:+.3f} to {one['interval'][1]:+.3f}" if one["interval"] else ""


def served(rows: Rows) -> str:
    lines = ["| method | task | rate | as trained | served unconverted | served converted |", "| --- " * 6 + "|"]
    for row in rows:
        scores = " | ".join(f"{row[kind]:.3f}" for kind in ("as trained", "unconverted", "converted"))
        lines.append(f"| {row['method']} | {row['task']} | {row['lr']:g} | {scores} |")
    return "\n".join(lines)


def by_vllm(result: dict[str, Any]) -> str:
    """Scores of all methods' adapters in one engine, beside those that training ended with."""
    engine = result["engine"] + (" with the plugin" if result["plugin"] else "")
    lines = [
        f"{result['task'].capitalize()}, seed {result['seed']}: all in one {engine}, in float32, on the base as it is, "
        f"which scores {result['base']:.3f} itself.\n",
        "| method | rate | as trained, by PEFT | unconverted, by vLLM | converted, by vLLM |", "| --- " * 5 + "|",
    ]  # fmt: skip
    for name, one in result["methods"].items():
        scores = (one["as trained"], one["by vLLM"]["trained"], one["by vLLM"]["converted"])
        rate = f"{one['lr']:g}" + ("" if one["swept"] else " (not swept)")
        lines.append(f"| {name} | {rate} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")
    return "\n".join(lines)


def deployed(value: dict[str, dict[str, dict[int, int]]]) -> str:
    counts = ", ".join(map(str, next(iter(value.values()))["on one base"]))
    lines = [f"| method | as trained, MB of {counts} tasks | all on one base |", "| --- " * 3 + "|"]
    for name, one in value.items():
        lines.append(f"| {name} | " + " | ".join(", ".join(map(str, size.values())) for size in one.values()) + " |")
    return "\n".join(lines)


def cost(by_device: dict[str, Any]) -> str:
    """One table a device: seconds and memory of each method, and its times over those of LoRA beside it."""
    parts = []
    for device, measured in by_device.items():
        heads = (
            "method", "before the first step, s", "a step, s", "over LoRA's", f"{STEPS} steps and before, over LoRA's",
            "peak, MB", "parameters",
        )  # fmt: skip
        lines = [f"**{device}**\n", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
        for name, one in measured["methods"].items():
            before, step = one["seconds before the first step"], one["seconds of a step"]
            lora_before, lora_step = one["LoRA's seconds"]
            whole = (before + STEPS * step) / (lora_before + STEPS * lora_step)
            size = f"{one['peak_MB']:,} | {one['parameters'] / 1e6:.2f} M"
            lines.append(f"| {name} | {before:.1f} | {step:.2f} | {step / lora_step:.2f} | {whole:.2f} | {size} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
