"""The numbers of metrics.jsonl for TensorBoard or Weights & Biases too, through Accelerate's trackers, when asked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gora_serve.config import Track
from gora_serve.errors import MachineError
from gora_serve.training.run_folder import Metrics, nowhere

FOLDER = "tracking"  # of the run: where TensorBoard's event files lie


def check_tracking(track: Track) -> None:
    """Raise MachineError (GS-559) where the package that `track` needs is not installed: asked before work starts."""
    found = None if track == "none" else find_spec(track)
    if track != "none" and (found is None or found.origin is None):  # a folder of that name is no package
        raise MachineError(
            f"--track {track} needs the package {track}",
            code="GS-559",
            hint=f"pip install {track}, or leave --track out",
        )


@contextmanager
def tracking(track: Track, folder: Path, name: str, settings: Mapping[str, Any]) -> Iterator[Metrics]:
    """Yield where lines of metrics go, beside the file; what is kept is flushed when the block ends.

    folder: the unfinished run. name: of the run, settings: of it; Weights & Biases shows both.
    """
    if track == "none":
        yield nowhere
        return
    tracker = _tensorboard(folder) if track == "tensorboard" else _wandb(folder, name, settings)
    try:
        yield lambda line: tracker.log(_numbers(line), step=line["step"])
    finally:
        tracker.finish()


def _tensorboard(folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(FOLDER, logging_dir=str(folder))
    tracker.start()
    return tracker


def _wandb(folder: Path, name: str, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker("gora-serve", name=name, dir=str(folder))
    tracker.start()
    tracker.store_init_configuration(dict(settings))
    return tracker


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key != "step" and value is not None and math.isfinite(value)}
