"""Pictures of the rows.

    python benchmarks/methods/picture.py

docs/methods.png: the loss on validation rows against the learning rate (B's: GoRA and LoRA+ give A a smaller one),
where GoRA's sweep is whole. docs/against.png: how much the score on test rows is above LoRA's, of each seed.
Needs matplotlib (the extra `report`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

matplotlib.use("Agg")

from matplotlib import pyplot, ticker

from methods.methods import methods
from methods.run import STEPS, all_rows, is_whole, rows, tried
from methods.tables import results, stored
from methods.tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs"
OURS = {
    "gora": ("black", 2.6, "-"), "gora-ratio-4": ("black", 1.8, "--"), "gora-ratio-1": ("black", 1.8, ":"),
    "lora": ("tab:red", 2.6, "-"),
}  # fmt: skip
SHOWN = 1.6  # times the lowest loss of the task: what is higher lies outside


def color_of(name: str) -> Any:
    """A method has its colour in every panel."""
    return pyplot.get_cmap("tab20")(list(methods(STEPS)).index(name) % 20)


def sweeps() -> None:
    found, every, chance = rows(), methods(STEPS), stored("guessing").get("tasks", {})
    losses = {
        task: {
            name: at for name, method in every.items()
            if not method.like and is_whole(method, at := tried(found, method, task, STEPS))
        }
        for task in TASKS
    }  # fmt: skip
    shown = {task: whole for task, whole in losses.items() if "gora" in whole}
    rows_of_two = -(-len(shown) // 2)
    figure, axes = pyplot.subplots(rows_of_two, 2, figsize=(13.0, 4.2 * rows_of_two), squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, (task, whole) in zip(axes.flat, shown.items(), strict=False):
        every_loss = [loss for at in whole.values() for loss in at.values() if math.isfinite(loss)]
        lowest, highest = min(every_loss), max(every_loss)
        for name, at in sorted(whole.items(), key=lambda one: min(one[1].values())):
            rates = sorted(lr for lr in at if math.isfinite(at[lr]))
            x, y = [lr * every[name].ratio for lr in rates], [at[lr] for lr in rates]
            color, width, dash = OURS.get(name, (color_of(name), 1.2, "-"))
            ax.plot(
                x, y, dash, marker="o", markersize=4, color=color, linewidth=width, label=f"{name}  {min(y):.4f}"
            )  # fmt: skip
        if task in chance:
            guess = chance[task]["valid"]["loss"]
            ax.axhline(guess, color="gray", linestyle="--", linewidth=1.0, label=f"guessing  {guess:.4f}")
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_ylim(lowest * 0.97, min(lowest * SHOWN, highest * 1.02))
        ax.set_title(f"{TASKS[task].kind}: loss on 150 validation rows")
        ax.set_xlabel("learning rate (of B)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", title="lowest loss", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(DOCS / "methods.png", dpi=130)


def against_lora() -> None:
    """A line for each method and task: a dot for each seed, the mean, and the interval that holds it with 95 %."""
    value = results([row for row in all_rows() if row["steps"] == STEPS])["methods"]
    pairs = [
        (task, name, one)
        for task in TASKS
        for name, method in value.items()
        if (score := method["against"]["lora"]["score"]) and (one := score["by task"].get(task))
    ]
    figure, ax = pyplot.subplots(figsize=(9.0, 0.42 * len(pairs) + 1.3))
    for place, (_, name, one) in enumerate(reversed(pairs)):
        color = "black" if name == "gora" else "tab:blue"
        if one["interval"]:
            ax.plot(one["interval"], [place, place], color=color, linewidth=1.6, alpha=0.6)
        ax.plot(one["of seeds"], [place] * len(one["of seeds"]), "o", color=color, markersize=5, alpha=0.6)
        ax.plot(one["mean"], place, "|", color=color, markersize=18, markeredgewidth=3)
    ax.axvline(0, color="tab:red", linewidth=1.6)
    ax.set_yticks(range(len(pairs)), [f"{TASKS[task].kind}: {name}" for task, name, _ in reversed(pairs)])
    ax.set_xlabel("score on test rows less LoRA's of the same seed: each seed, the mean, 95 % of it")
    ax.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "against.png", dpi=130)


def main() -> None:
    sweeps()
    against_lora()


if __name__ == "__main__":
    main()
