"""Pictures of results. Needs matplotlib: the extra `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gora_serve.adapter.names import kinds_and_layers
from gora_serve.errors import MachineError
from gora_serve.gora.ranks import RankPlan
from gora_serve.integrity.files import write_bytes


def plot_ranks(plan: RankPlan, file: Path) -> None:
    """Draw the ranks as layer by kind of module (the paper's figure 3a): PNG, SVG or PDF, by the file's ending."""
    import io

    pyplot = _pyplot()
    kinds, layers, grid = _grid(plan)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.32 * len(layers) + 2.5), 0.5 * len(kinds) + 1.8))
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_xlabel("layer")
    share = plan.parameters / plan.lora_parameters
    axes.set_title(f"Ranks: {plan.parameters:,} parameters, {share:.1%} of LoRA's at rank {plan.rank}")
    figure.colorbar(image, label="rank")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix[1:] or "png", dpi=150)
    pyplot.close(figure)
    write_bytes(file, buffer.getvalue())


def _grid(plan: RankPlan) -> tuple[list[str], list[str], list[list[float]]]:
    """Return kinds, layers and ranks[kind][layer]; NaN where a layer has no such module."""
    named = kinds_and_layers(plan.ranks)
    cells = {named[path]: rank for path, rank in plan.ranks.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = list(dict.fromkeys(layer for _, layer in cells))
    return kinds, layers, [[cells.get((kind, layer), float("nan")) for layer in layers] for kind in kinds]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as err:
        raise MachineError("pictures need matplotlib", code="GS-524", hint="pip install 'gora-serve[report]'") from err
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
