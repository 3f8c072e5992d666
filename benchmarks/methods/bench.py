"""The base, loaded once, and copies of it; the tasks' rows, tokenised once; what a method made of them, while it is
asked for with other learning rates."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gora_serve.config import DataConfig, ModelConfig, TrainConfig
from gora_serve.training.data import Dataset, schedule
from gora_serve.training.session import LazyBatch, Session, open_session
from gora_serve.training.targets import find_targets
from methods.methods import ESTIMATE, Method, Probes
from methods.tasks import TASKS

BATCH, LENGTH = 8, 512


def kept_name(method: str, task: str, seed: int, lr: float) -> str:
    """Return the name of the folder in which a row's adapters are kept."""
    return f"{method}-{task}-{seed}-{lr:g}"


@dataclass
class Bench:
    """alone: one row is made, and nothing kept for others, so that memory is the method's own. keep: where the adapters
    of rows that are served stay; None for nowhere."""

    base: str
    alone: bool = False
    keep: Path | None = None
    probes: Probes = field(default_factory=Probes)
    _sessions: dict[bool, Session] = field(default_factory=dict)
    _rows: dict[tuple[str, str], Dataset] = field(default_factory=dict)
    _prepared: tuple[Any, tuple[nn.Module, dict[str, Any]]] | None = None

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """Yield a folder for a row's adapters."""
        if self.keep is None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
        else:
            (self.keep / name).mkdir(parents=True, exist_ok=True)
            yield self.keep / name

    def loaded(self, *, quantize: bool) -> Session:
        """The base as it was loaded: only copies of its model are changed."""
        if quantize not in self._sessions:
            model = ModelConfig(dtype="float32", quantize="nf4" if quantize else "none")
            rows = DataConfig(max_length=LENGTH, batch_size=BATCH)
            data = str(TASKS["sentiment"].file("valid"))
            # bfloat16 products where TF32 is not to be had; the weights stay in float32
            train = TrainConfig(mixed_precision="no" if torch.cuda.is_available() else "bf16")
            session = open_session(self.base, data, model=model, rows=rows, train=train, listen=lambda _: None)
            if not torch.cuda.is_available():  # torch's fused attention is slow backwards in bfloat16 there
                session.model.set_attn_implementation("eager")  # type: ignore[operator]
            self._sessions[quantize] = session
        return self._sessions[quantize]

    def rows(self, task: str, split: str) -> Dataset:
        if (task, split) not in self._rows:
            given = DataConfig(max_length=LENGTH, batch_size=BATCH)
            some = next(iter(self._sessions.values()), None) or self.loaded(quantize=False)
            self._rows[task, split] = some.load(str(TASKS[task].file(split)), given)
        return self._rows[task, split]

    def session(self, task: str, seed: int, *, quantize: bool = False) -> Session:
        """Return a session of its own: a copy of the base's model on the device, the task's training rows, the seed.

        Alone it is the model itself.
        """
        whole = self.loaded(quantize=quantize)
        model = whole.model if self.alone else copy.deepcopy(whole.model)
        modules = find_targets(model, "all-linear")
        return replace(whole, model=model, modules=modules, data=self.rows(task, "train"), seed=seed)

    def prepared(
        self, method: Method, task: str, seed: int, steps: int
    ) -> tuple[Session, nn.Module, dict[str, Any], list[LazyBatch]]:
        """Return the session, the model to be trained, what is noted of it, and the training batches.

        What a method made is kept, and a copy of it given out: it is asked for again with other learning rates.
        """
        key = (method.name, task, seed, steps)
        session = self.session(task, seed, quantize=method.quantize)
        order = schedule(len(session.data.examples), BATCH, batches=steps + ESTIMATE, seed=seed)
        batches = session.batches(session.data.examples, order)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None
            torch.manual_seed(seed)
            model, noted = method.start(session, batches[steps:])
            model.to(session.accelerator.device)
            if self.alone:
                self.probes.forget()
                return session, model, noted, batches[:steps]
            self._prepared = key, (model, noted)
        model, noted = self._prepared[1]
        return session, copy.deepcopy(model), dict(noted), batches[:steps]
