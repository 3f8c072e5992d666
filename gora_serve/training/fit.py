"""The main job: base and data in, a run folder with a trained adapter out. The stages themselves are in run.py."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gora_serve.config import FitConfig, RankConfig
from gora_serve.errors import GoraError, MachineError, Stopped, UsageError
from gora_serve.gora.ranks import RankPlan, lora_parameters
from gora_serve.integrity.bases import locate_base
from gora_serve.integrity.files import staged_folder
from gora_serve.integrity.space import require_space
from gora_serve.integrity.staging import check_partial, check_target, partial_of
from gora_serve.progress import Listener, Progress, silent
from gora_serve.training.checkpoint import discard_all, sweep_finished
from gora_serve.training.out_of_memory import naming_memory
from gora_serve.training.resume import RUN, check_settings
from gora_serve.training.run import FitResult, Run
from gora_serve.training.run_files import read_ranks
from gora_serve.training.run_folder import RunFolder
from gora_serve.training.session import Session, open_session, peak_bytes
from gora_serve.training.tracking import check_tracking, tracking
from gora_serve.training.train_stage import NEXT, Stop, count_steps
from gora_serve.training.weights import weight_shape

log = logging.getLogger(__name__)


def fit(
    base: str,
    data: str,
    output: Path,
    config: FitConfig | None = None,
    *,
    eval_data: str | None = None,
    ranks_file: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    stop: Stop = lambda: None,
    listen: Listener = silent,
) -> FitResult:
    """Fit an adapter for one task: probe, allocate ranks, initialise, train, prove that the base is untouched.

    base: a model folder or hub id. data, eval_data: files or hub datasets (training/data.py). output: the run
    folder; until the run is complete it is `<output>.partial`, which stays there when the run fails. `resume`: go on
    with what is there, if anything is; the adapter is then the one that an unbroken run gives. `stop` is asked at
    every safe point for a signal that came. Under `accelerate launch` every process calls this, and the first alone
    writes.
    Raises GoraError: UsageError and InputError before anything is written, BindingError when the unfinished run is
    another one, RunError when the loss is not finite, MismatchError when the base changed. Raises Stopped.
    """
    config = config or FitConfig()
    config.validate()
    check_tracking(config.train.track)
    if resume and overwrite:
        raise UsageError(
            "--resume goes on and --overwrite starts anew: give one of them",
            code="GS-211",
            hint="leave one of them out",
        )
    started = time.perf_counter()
    if resume:
        sweep_finished(output)
    check_target(output, overwrite=overwrite, protect=[locate_base(base).path], resume=resume)
    partial = check_partial(output, overwrite=overwrite, resume=resume, mark=RUN)
    if resume:
        check_settings(partial, asdict(config))
    early = stoppable(listen, stop, kept="nothing was written")
    session = open_session(base, data, model=config.model, rows=config.data, train=config.train, listen=early)
    count_steps(session, config.train)  # too many are refused before the probe
    held_out = session.load(eval_data, config.data) if eval_data else None
    shapes = {path: weight_shape(module) for path, module in session.modules.items()}
    given = read_ranks(ranks_file, shapes) if ranks_file else None
    require_space(output, run_bytes(shapes, config.ranks, given))
    listen = stoppable(listen, stop, kept=f"the stages that were finished are in {partial}", hint=NEXT)
    with _run_folder(output, session, config, overwrite=overwrite, resume=resume) as folder:
        run = Run(session, config, folder, held_out=held_out, given=given, stop=stop, listen=listen)
        if resume:
            run.resume()
        run.note(status="running")
        try:
            with naming_memory():
                result = run.stages(shapes, output)
        except BaseException as err:  # whatever ends the run, run.json says so; the error goes on
            _note_end(run, err, time.perf_counter() - started)
            raise
        seconds = time.perf_counter() - started
        run.note(status="complete", seconds=seconds, result=_summary(result, session), base_after=result.base_after)
    if folder.writes:
        discard_all(output)
    return result


def run_bytes(shapes: Mapping[str, tuple[int, int]], ranks: RankConfig, given: RankPlan | None = None) -> int:
    """Return about how many bytes a run takes beside its small files, for modules of these shapes, (out, in).

    The adapter, and three checkpoints (two that are kept and one that is written) with AdamW's two moments, in float32
    at the ranks given, or at what LoRA has at --rank; the probe's statistics at the highest rank.
    """
    parameters = given.parameters if given else lora_parameters(shapes, ranks.rank)
    highest = max(ranks.highest, given.rank_max if given else 0)
    return 4 * ((1 + 3 * 3) * parameters + lora_parameters(shapes, highest))


def stoppable(listen: Listener, stop: Stop, *, kept: str, hint: str | None = None) -> Listener:
    """Return a listener that raises Stopped at the first event after a signal; training has safe points of its own."""

    def listening(event: Progress) -> None:
        listen(event)
        number = stop()
        if number is not None and event.stage != "train":
            what = f"stopped by {signal.Signals(number).name} during {event.stage}"
            raise Stopped(what, number=number, kept=kept, hint=hint)

    return listening


@contextmanager
def _run_folder(
    output: Path, session: Session, config: FitConfig, *, overwrite: bool, resume: bool
) -> Iterator[RunFolder]:
    if not session.accelerator.is_main_process:
        yield RunFolder(partial_of(output), writes=False)
        return
    protect = [session.base.path]
    staged = staged_folder(output, overwrite=overwrite, protect=protect, visible=True, resume=resume, mark=RUN)
    with staged as path, tracking(config.train.track, path, output.name, asdict(config)) as also:
        yield RunFolder(path, writes=True, also=also)


def _note_end(run: Run, err: BaseException, seconds: float) -> None:
    status = "stopped" if isinstance(err, Stopped | KeyboardInterrupt | SystemExit) else "failed"
    try:
        run.note(status=status, error=_error_json(err), seconds=seconds)
    except MachineError as fault:  # a full disk, say: it must not hide what ended the run
        log.warning("run.json does not say how the run ended: %s", fault.what)


def _error_json(err: BaseException) -> object:
    if isinstance(err, GoraError):
        return err.to_json()["error"]
    if isinstance(err, Stopped):
        return {"what": err.what}
    return {"what": "interrupted" if isinstance(err, KeyboardInterrupt | SystemExit) else type(err).__name__}


def _summary(result: FitResult, session: Session) -> dict[str, Any]:
    return {
        "gamma": result.gamma,
        "parameters": result.adapter.parameters,
        "losses": dict(result.losses),
        "seconds_by_stage": dict(result.seconds),
        "peak_bytes": peak_bytes(session.accelerator.device),
    }
