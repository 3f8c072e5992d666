"""A server of the command line, clients that keep it busy, and PEFT as the judge of every answer they got."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.errors import GoraError
from gora_serve.serving.client import Completion, complete
from gora_serve.serving.engine import free_port

TOP = 5  # log probabilities compared at each step
FOREVER = float("inf")


class Running:
    """`gora-serve serve` in a process of its own. What it says is in a file."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], said: Path) -> None:
        self.url, self.process, self._said = url, process, said

    def lines(self, begin: str = "") -> list[str]:
        return [line for line in self._said.read_text(errors="replace").splitlines() if line.startswith(begin)]

    def wait(self, begin: str, count: int = 1, seconds: float = 300.0) -> float:
        """Wait for so many lines that begin so; return the time."""
        deadline = time.monotonic() + seconds
        while len(self.lines(begin)) < count:
            assert self.process.poll() is None, "\n".join(self.lines())
            assert time.monotonic() < deadline, f"no {begin!r}: " + "\n".join(self.lines())
            time.sleep(0.1)
        return time.monotonic()


@contextmanager
def serving(base: Path, folder: Path, *words: str) -> Iterator[Running]:
    """Start the command line in float32; its words and the engine's are in `folder`. It is killed on leaving."""
    port, said = free_port(), folder / "said.txt"
    argv = [sys.executable, "-m", "gora_serve", "serve", str(base), "--port", str(port), "--served-name", "base"]
    argv += ["--dtype", "float32", "--max-model-len", "512", "--log", str(folder / "engine.log"), *words]
    with (
        said.open("wb") as stream,
        subprocess.Popen(argv, stderr=stream, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as it,
    ):
        try:
            yield Running(f"http://127.0.0.1:{port}", it, said)
        finally:
            it.kill()  # its engine ends with it


@dataclass(frozen=True)
class Asked:
    """One request: what, when, and the answer, or why there is none."""

    model: str
    prompt: tuple[int, ...]
    begun: float
    ended: float
    answer: Completion | None = None
    error: str | None = None


class Traffic:
    """Clients that ask all models in turn, until they have asked `most` times or are told to stop."""

    def __init__(
        self, url: str, models: Sequence[str], prompts: Sequence[tuple[int, ...]], *, workers: int, steps: int = 2,
        most: int | None = None,
    ) -> None:  # fmt: skip
        self.models, self.asked = list(models), list[Asked]()
        self._url, self._prompts, self._steps, self._most = url, prompts, steps, most
        self._turn, self._lock, self._stop = itertools.count(), threading.Lock(), threading.Event()
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> Traffic:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        for worker in self._workers:
            worker.join()

    def after(self, count: int, seconds: float = 600.0) -> None:
        """Wait until so many more were answered."""
        until, deadline = len(self.asked) + count, time.monotonic() + seconds
        while len(self.asked) < until and any(worker.is_alive() for worker in self._workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def without(self, model: str) -> None:
        """Ask a model no more; return when its last answer has come."""
        with self._lock:
            self.models.remove(model)
        self.after(len(self._workers))

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                turn = next(self._turn)
                if self._most is not None and turn >= self._most:
                    return
                model = self.models[turn % len(self.models)]
                prompt = self._prompts[turn // len(self.models) % len(self._prompts)]
            self.asked.append(self._ask(model, prompt))

    def _ask(self, model: str, prompt: tuple[int, ...]) -> Asked:
        begun = time.monotonic()
        try:
            answer = complete(self._url, model, prompt, self._steps, logprobs=TOP)
        except GoraError as err:
            return Asked(model, prompt, begun, time.monotonic(), error=str(err))
        return Asked(model, prompt, begun, time.monotonic(), answer)


@dataclass(frozen=True)
class Version:
    """An adapter as PEFT knows it, and when its model could answer by it: from when its folder came until it was seen
    to be replaced."""

    known: str | None
    since: float = 0.0
    until: float = FOREVER


Logprobs = Callable[[str | None, Sequence[int], int], Any]  # (name in PEFT, tokens, steps) -> (steps, vocabulary)


def distances(asked: Sequence[Asked], versions: Mapping[str, Sequence[Version]], logprobs: Logprobs) -> list[float]:
    """Return for each answer the largest difference of a log probability to what PEFT says of the nearest version that
    could have answered."""
    seen: dict[tuple[str | None, tuple[int, ...]], Any] = {}

    def distance(known: str | None, one: Asked) -> float:
        assert one.answer is not None
        served = [next(iter(step)) for step in one.answer.top]
        tokens = (*one.prompt, *served[:-1])
        if (known, tokens) not in seen:
            seen[known, tokens] = logprobs(known, tokens, len(served))
        rows = seen[known, tokens]
        return max(
            abs(value - float(row[token]))
            for step, row in zip(one.answer.top, rows, strict=True)
            for token, value in step.items()
        )

    found = []
    for one in asked:
        could = [v for v in versions[one.model] if v.since < one.ended and v.until > one.begun]
        found.append(min(distance(version.known, one) for version in could))
    return found
