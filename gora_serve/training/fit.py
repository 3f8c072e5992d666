"""The main job: base and data in, a run folder with a trained adapter out. The stages themselves are in run.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gora_serve.config import FitConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import locate_base
from gora_serve.integrity.files import staged_folder
from gora_serve.integrity.staging import check_partial, check_target
from gora_serve.progress import Listener, silent
from gora_serve.training.run import FitResult, Run
from gora_serve.training.run_files import read_ranks
from gora_serve.training.run_folder import RunFolder
from gora_serve.training.session import Session, naming_memory, open_session
from gora_serve.training.weights import weight_shape


def fit(
    base: str,
    data: str,
    output: Path,
    config: FitConfig | None = None,
    *,
    eval_data: str | None = None,
    ranks_file: Path | None = None,
    overwrite: bool = False,
    listen: Listener = silent,
) -> FitResult:
    """Fit an adapter for one task: probe, allocate ranks, initialise, train, prove that the base is untouched.

    base: a model folder or hub id. data, eval_data: files or hub datasets (training/data.py). output: the run
    folder; until the run is complete it is `<output>.partial`, which stays there when the run fails. Under
    `accelerate launch` every process calls this, and the first alone writes.
    Raises GoraError: UsageError and InputError before anything is written, RunError when the loss is not finite,
    MismatchError when the base changed.
    """
    config = config or FitConfig()
    config.validate()
    started = time.perf_counter()
    check_target(output, overwrite=overwrite, protect=[locate_base(base).path])
    check_partial(output, overwrite=overwrite)
    session = open_session(base, data, model=config.model, rows=config.data, train=config.train, listen=listen)
    held_out = session.load(eval_data, config.data) if eval_data else None
    shapes = {path: weight_shape(module) for path, module in session.modules.items()}
    given = read_ranks(ranks_file, shapes) if ranks_file else None
    with _run_folder(output, session, overwrite) as folder:
        run = Run(session, config, folder, held_out, listen)
        run.note(status="running")
        try:
            with naming_memory():
                result = run.stages(shapes, given, output)
        except BaseException as err:  # whatever ends the run, run.json says so; the error goes on
            run.note(status="failed", error=_error_json(err), seconds=time.perf_counter() - started)
            raise
        seconds = time.perf_counter() - started
        run.note(status="complete", seconds=seconds, result=_summary(result), base_after=result.base_after)
    return result


@contextmanager
def _run_folder(output: Path, session: Session, overwrite: bool) -> Iterator[RunFolder]:
    if not session.accelerator.is_main_process:
        yield RunFolder(None)
        return
    with staged_folder(output, overwrite=overwrite, protect=[session.base.path], visible=True) as path:
        yield RunFolder(path)


def _error_json(err: BaseException) -> object:
    if isinstance(err, GoraError):
        return err.to_json()["error"]
    return {"what": "interrupted" if isinstance(err, KeyboardInterrupt | SystemExit) else type(err).__name__}


def _summary(result: FitResult) -> dict[str, Any]:
    return {
        "gamma": result.gamma,
        "parameters": result.adapter.parameters,
        "losses": dict(result.losses),
        "seconds_by_stage": dict(result.seconds),
    }
