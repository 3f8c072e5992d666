"""Pictures of results. Needs matplotlib: the extra `report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gora_serve.adapter.names import kinds_and_layers
from gora_serve.errors import MachineError, UsageError
from gora_serve.gora.ranks import RankPlan
from gora_serve.integrity.file_targets import check_file
from gora_serve.integrity.files import make_parents, write_bytes

if TYPE_CHECKING:
    from gora_serve.deploy.gap import Gap


PICTURES = (".png", ".svg", ".pdf")


def check_picture(file: Path, *, overwrite: bool) -> None:
    """Say before work starts that a picture cannot be drawn here: UsageError (GS-201) for a kind that is not drawn, and
    as `check_file`."""
    if file.suffix.lower() not in ("", *PICTURES):
        raise UsageError(
            "no picture is drawn in a file of this kind", code="GS-201", file=file, expected=", ".join(PICTURES),
            actual=file.suffix, hint="give the file another ending",
        )  # fmt: skip
    check_file(file, "picture", overwrite=overwrite)


def plot_ranks(plan: RankPlan, file: Path) -> None:
    """Draw the ranks as layer by kind of module (the paper's figure 3a): PNG, SVG or PDF, by the file's ending."""
    pyplot = _pyplot()
    kinds, layers, grid = _grid(plan.ranks)
    size = max(6.0, 0.32 * len(layers) + 2.5), 0.5 * len(kinds) + 1.8
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = _heat_map(axes, kinds, layers, grid)
    share = plan.parameters / plan.lora_parameters
    axes.set_title(f"Ranks: {plan.parameters:,} parameters, {share:.1%} of LoRA's at rank {plan.rank}")
    figure.colorbar(image, label="rank", pad=0.01)
    _write(pyplot, figure, file)


def plot_gap(gap: Gap, file: Path, *, dtype: str, title: str) -> None:
    """Draw the error of each module if the adapter is served as it is, and the errors of all in total, by cause.

    dtype: what the factors are stored in. Where no engine loads the adapter, the map shows the update itself.
    """
    pyplot = _pyplot()
    part = "unconverted" if gap.loads else "update"
    kinds, layers, grid = _grid({path: getattr(one, part) / (one.weight or 1.0) for path, one in gap.modules.items()})
    size = max(6.5, 0.32 * len(layers) + 3.0), 0.45 * len(kinds) + 4.6
    heights = [0.45 * len(kinds) + 1.0, 2.4]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=size, height_ratios=heights, layout="constrained")
    image = _heat_map(top, kinds, layers, grid)
    top.set_title("Served as it is: error / |W0|" if gap.loads else "No engine loads it as LoRA. Its update / |W0|")
    figure.colorbar(image, ax=top, pad=0.01)
    shares = gap.shares()
    named = {
        "served as it is": shares["unconverted_of_update"],
        "rounding of the edited base": shares["base_rounding_of_update"],
        f"not compressed, {dtype}": shares["stored_plain_of_update"],
        f"converted, {dtype}": shares["stored_of_update"],
    }
    known = {name: value for name, value in named.items() if value}
    bars = bottom.barh(list(known), list(known.values()), color="tab:blue")
    bottom.bar_label(bars, [f"{value:.2g}" for value in known.values()], padding=3)
    if known:
        bottom.set_xscale("log")
        bottom.set_xlim(min(known.values()) / 3, max(1.0, *known.values()) * 6)
    bottom.axvline(1.0, color="gray", linewidth=1)
    bottom.invert_yaxis()
    bottom.set_title("All modules together: error / |dW|")
    figure.suptitle(title, fontsize="medium")
    _write(pyplot, figure, file)


def _heat_map(axes: Any, kinds: list[str], layers: list[str], grid: list[list[float]]) -> Any:
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_xlabel("layer")
    return image


def _write(pyplot: Any, figure: Any, file: Path) -> None:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix[1:].lower() or "png", dpi=150)
    pyplot.close(figure)
    write_bytes(make_parents(file), buffer.getvalue())


def _grid(values: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float]]]:
    """Return kinds, layers and values[kind][layer]; NaN where a layer has no such module."""
    named = kinds_and_layers(values)
    cells = {named[path]: value for path, value in values.items()}
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
