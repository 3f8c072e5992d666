"""docs/methods.png: the loss on validation rows against the learning rate, where GoRA's sweep is whole.

    python benchmarks/methods/picture.py

Needs matplotlib (the extra `report`). The rate is B's: GoRA and LoRA+ give A a smaller one.
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
from methods.run import STEPS, is_whole, rows, tried
from methods.tasks import TASKS

PICTURE = Path(__file__).parents[2] / "docs" / "methods.png"
OURS = {
    "gora": ("black", 2.6, "-"), "gora-ratio-4": ("black", 1.8, "--"), "gora-ratio-1": ("black", 1.8, ":"),
    "lora": ("tab:red", 2.6, "-"),
}  # fmt: skip
SHOWN = 1.6  # times the lowest loss of the task: what is higher lies outside


def color_of(name: str) -> Any:
    """A method has its colour in every panel."""
    return pyplot.get_cmap("tab20")(list(methods(STEPS)).index(name) % 20)


def main() -> None:
    found, every = rows(), methods(STEPS)
    losses = {
        task: {
            name: at for name, method in every.items()
            if not method.like and is_whole(method, at := tried(found, method, task, STEPS))
        }
        for task in TASKS
    }  # fmt: skip
    shown = {task: whole for task, whole in losses.items() if "gora" in whole}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.6 * len(shown) + 1.4, 4.2), squeeze=False)
    for ax, (task, whole) in zip(axes[0], shown.items(), strict=True):
        lowest = min(min(at.values()) for at in whole.values())
        for name, at in sorted(whole.items(), key=lambda one: min(one[1].values())):
            rates = sorted(lr for lr in at if math.isfinite(at[lr]))
            x, y = [lr * every[name].ratio for lr in rates], [at[lr] for lr in rates]
            color, width, dash = OURS.get(name, (color_of(name), 1.2, "-"))
            ax.plot(
                x, y, dash, marker="o", markersize=4, color=color, linewidth=width, label=f"{name}  {min(y):.4f}"
            )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_ylim(lowest * 0.97, lowest * SHOWN)
        ax.set_title(f"{TASKS[task].kind}: loss on 150 validation rows")
        ax.set_xlabel("learning rate (of B)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small", title="lowest loss", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
