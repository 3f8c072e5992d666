"""Commands that write, on a tiny base: their inputs, their earlier and their new output, and how to judge what is left.

Everything is imported and used once in this process, so that a fork of it runs a command in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faults import REMOVALS, Call, Counter, Fault, install
from killing import content as run_content
from tiny_models import build_llama, build_tokenizer, color_rows, write_jsonl
from tqdm import tqdm

import converters.combining
import converters.convert
import converters.merging  # noqa: F401 - imported once, for all forks, as those around it
import gora_serve.cli.render_convert
import gora_serve.cli.render_merge
import gora_serve.report.page
import gora_serve.training.export
import gora_serve.training.fit
import gora_serve.training.probe_run  # noqa: F401 - imported once, for all forks
from gora_serve.cli.main import cli, main
from gora_serve.errors import GoraError
from gora_serve.integrity import publishing
from gora_serve.integrity.binding import check_folder

State = Mapping[str, object]
SMALL = (
    "--rank", "2", "--steps", "2", "--save-every", "1", "--probe-steps", "1", "--gamma", "0.1", "--batch-size", "2",
    "--max-length", "96", "--dtype", "float32",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The inputs, which no command may change: a base and its twin, data, a finished run, an adapter of PEFT's."""

    work: Path

    @property
    def inputs(self) -> Path:
        return self.work / "inputs"

    def path(self, name: str) -> str:
        return str(self.inputs / name)


@dataclass(frozen=True)
class Command:
    """A command line with two settings that give different outputs: the earlier one, and the new one."""

    name: str
    words: Callable[[World], list[str]]
    old: tuple[str, ...]
    new: tuple[str, ...]
    output: str = "out"
    option: str = "--output"

    def argv(self, world: World, folder: Path, settings: tuple[str, ...]) -> list[str]:
        return [*self.words(world), self.option, str(folder / self.output), *settings]


def commands() -> list[Command]:
    """Those of this version that write an output."""
    known = [
        Command("fit", lambda w: ["fit", w.path("base"), "--data", w.path("data.jsonl"), *SMALL],
                ("--seed", "1"), ("--seed", "0")),
        Command("probe", lambda w: ["probe", w.path("base"), "--data", w.path("data.jsonl"), "--probe-steps", "1",
                                    "--batch-size", "2", "--max-length", "96", "--dtype", "float32"],
                ("--seed", "1"), ("--seed", "0")),
        Command("ranks", lambda w: ["ranks", w.path("run")], ("--rank", "2"), ("--rank", "4"), "ranks.json"),
        Command("export", lambda w: ["export", w.path("run")], ("--form", "native"), ("--form", "unit")),
        Command("export --gguf", lambda w: ["export", w.path("run"), "--gguf"],
                ("--form", "native"), ("--form", "unit")),
        Command("convert", lambda w: ["convert", w.path("foreign"), "--base", w.path("base")],
                ("--form", "native"), ("--form", "unit")),
        Command("merge", lambda w: ["merge", w.path("base"), "-a", w.path("foreign")],
                ("--dtype", "bfloat16"), ("--dtype", "auto")),
        Command("merge --into adapter",
                lambda w: ["merge", w.path("base"), "-a", w.path("foreign"), "--into", "adapter"],
                ("--form", "native"), ("--form", "unit")),
        Command("hash", lambda w: ["hash"], ("--json", "twin"), ("--json", "base"), "manifest.json"),
        Command("hash --oms", lambda w: ["hash"], ("--json", "twin"), ("--json", "base"), "base.oms.json", "--oms"),
        Command("bind", lambda w: ["bind", w.path("foreign")], ("--base", "twin"), ("--base", "base")),
        Command("report", lambda w: ["report"], ("second",), ("run",), "report.html"),
    ]  # fmt: skip
    return [command for command in known if command.name.split()[0] in cli.commands]


def build_world(work: Path) -> World:
    """Make the inputs below `work`, with the commands themselves where that is how they are made."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that forks share: one killed with it stops all later ones
    os.environ["GORA_SERVE_CACHE"] = str(work / "cache")
    world = World(work)
    world.inputs.mkdir(parents=True)
    for name, seed in (("base", 0), ("twin", 1)):
        build_llama(seed).save_pretrained(world.inputs / name, max_shard_size="100KB")
        build_tokenizer().save_pretrained(world.inputs / name)
    write_jsonl(world.inputs / "data.jsonl", color_rows(12))
    _make_foreign(world.inputs / "foreign")
    run = fork(["fit", world.path("base"), "--data", world.path("data.jsonl"), *SMALL, "--output", world.path("run")],
               work / "made")  # fmt: skip
    assert run.status == 0, run.stderr
    shutil.copytree(world.inputs / "run", world.inputs / "second")
    return world


def _make_foreign(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(build_llama(0), config).save_pretrained(folder)


@dataclass(frozen=True)
class Ended:
    """How a forked command ended (exit code, or minus a signal), what it said, its calls, and the call that failed."""

    status: int
    stderr: str
    calls: tuple[Call, ...] = ()
    hit: Call | None = None


def fork(
    argv: list[str], scratch: Path, *, watch: Path | None = None, fault: Fault | None = None,
    before: Callable[[], object] | None = None,
) -> Ended:  # fmt: skip
    """Run a command line in a forked child; count, and spoil, its calls below `watch`."""
    return wait(start(argv, scratch, watch=watch, fault=fault, before=before))


@dataclass(frozen=True)
class Child:
    """A forked command: its pid, the pipe of what it says, the folder of what the rig notes of it."""

    pid: int
    says: int
    scratch: Path


def start(
    argv: list[str], scratch: Path, *, watch: Path | None = None, fault: Fault | None = None,
    before: Callable[[], object] | None = None,
) -> Child:  # fmt: skip
    scratch.mkdir(parents=True, exist_ok=True)
    says, stderr = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads may hold locks
        pid = os.fork()
    if pid == 0:
        _child(argv, scratch, stderr, watch, fault, before)
    os.close(stderr)
    return Child(pid, says, scratch)


def wait(child: Child) -> Ended:
    with os.fdopen(child.says, encoding="utf-8", errors="replace") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    calls = tuple(Call(*line.split("\t", 1)) for line in _text(child.scratch / "calls").splitlines())
    hit = _text(child.scratch / "hit")
    return Ended(status, said, calls, Call(*json.loads(hit)) if hit else None)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _child(
    argv: list[str],
    scratch: Path,
    stderr: int,
    watch: Path | None,
    fault: Fault | None,
    before: Callable[[], object] | None,
) -> None:
    """Never returns."""
    status = 70
    try:
        made = {name: os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                for name in ("calls", "hit")}  # fmt: skip
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(1, "w")),
            io.TextIOWrapper(io.FileIO(2, "w"), line_buffering=True),
        )  # type: ignore[arg-type, assignment]
        logging.getLogger().handlers = []
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        counter = Counter(watch or scratch / "nowhere", fault, made["hit"])
        if watch:
            install(counter)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            if before:
                before()
            status = main(argv)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        except SystemExit as err:
            status = err.code if isinstance(err.code, int) else 1
        except KeyboardInterrupt:  # as SystemExit: just before the command's own handlers, or just after them
            status = 128 + signal.SIGINT
        sys.stderr.flush()
        if fault is None and before in (None, without_renameat2):
            _write(made["calls"], "".join(f"{call.name}\t{call.path}\n" for call in counter.calls).encode())
    except BaseException as err:
        _write(2, f"the rig itself: {err!r}\n".encode())
    finally:
        os._exit(status)


_write = os.write


def without_renameat2() -> None:
    """As on a file system that cannot exchange two folders in one step."""
    publishing.renameat2 = lambda *_: False


def digests(place: Path) -> State | None:
    """The SHA-256 of every file at or below `place`; None where there is nothing."""
    if not os.path.lexists(place):
        return None
    if place.is_file():
        return {"": hashlib.sha256(place.read_bytes()).hexdigest()}
    files = sorted(path for path in place.rglob("*") if not path.is_dir())
    return {path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Bench:
    """One command into one kind of place, fresh or over an earlier output: its reference, its points, its verdicts."""

    def __init__(self, world: World, command: Command, *, over: bool, exchange: bool = True) -> None:
        self.world, self.command, self.over, self.exchange = world, command, over, exchange
        self.name = f"{command.name} {'--overwrite' if over else 'fresh'}{'' if exchange else ' without renameat2'}"
        self.place = world.work / self.name.replace(" ", "")
        self.folder = self.place / "outputs"
        self.inputs = digests(world.inputs)
        self.earlier = self._make(command.old, "earlier")
        self.expected = self.content(self._make(command.new, "expected"))
        self.old = digests(self.earlier) if over else None
        assert self.content(self.earlier) != self.expected
        self.reset()
        self.reference = self.run()
        assert self.reference.status == 0, self.reference.stderr
        assert self.judge() == "new"

    def _make(self, settings: tuple[str, ...], name: str) -> Path:
        folder = self.place / name
        folder.mkdir(parents=True)
        made = fork(self.argv(settings, folder=folder), self.place / "scratch")
        assert made.status == 0, made.stderr
        return folder / self.command.output

    def argv(self, settings: tuple[str, ...] | None = None, *more: str, folder: Path | None = None) -> list[str]:
        words = self.command.argv(self.world, folder or self.folder, settings or self.command.new)
        # "hash", "bind" and "report" name an input by their last words
        inputs = ("base", "twin", "run", "second")
        return [self.world.path(word) if word in inputs else word for word in words] + list(more)

    def new_argv(self) -> list[str]:
        return self.argv(None, *(["--overwrite"] if self.over else []))

    def content(self, place: Path) -> State | None:
        """What is at `place`, times left out, for comparison with what the command should give."""
        if not os.path.lexists(place):
            return None
        if self.command.name == "fit":  # what is published goes on with dropping its checkpoints, which nobody needs
            return {name: value for name, value in run_content(place).items() if not name.startswith("checkpoints/")}
        found = digests(place)
        if self.command.name == "probe" and found is not None:
            return {name: value for name, value in found.items() if name not in ("run.json", "gora_manifest.json")}
        return found

    def reset(self) -> None:
        """Put the place in the state that the command finds."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.over:
            copy = shutil.copytree if self.earlier.is_dir() else shutil.copy2
            copy(self.earlier, self.folder / self.command.output)  # type: ignore[operator]

    def run(self, fault: Fault | None = None, before: Callable[[], object] | None = None) -> Ended:
        before = before or (None if self.exchange else without_renameat2)
        return fork(self.new_argv(), self.place / "scratch", watch=self.folder, fault=fault, before=before)

    def judge(self) -> str:
        """Say what is there now: "old", "new", "absent" or "torn: why"."""
        if digests(self.world.inputs) != self.inputs:
            return "torn: an input has changed"
        output = self.folder / self.command.output
        if self.over and digests(output) == self.old:
            return "old"
        if not os.path.lexists(output):
            aside = [path for path in self.folder.iterdir() if path.name.endswith(".old")]
            if not self.exchange and [digests(path) for path in aside] == [self.old]:
                return "set aside"  # between the two renames: the next run puts it back
            return "torn: the earlier output is gone" if self.over else "absent"
        try:
            if output.is_dir() and (output / "gora_manifest.json").exists():
                check_folder(output)
            if self.command.name == "fit":
                check_folder(output / "adapter")
                assert '"status": "complete"' in (output / "run.json").read_text()
            same = self.content(output) == self.expected
        except (GoraError, AssertionError, KeyError, ValueError, OSError) as err:
            return f"torn: {err!r}"
        return "new" if same else "torn: other content"

    def left(self) -> list[str]:
        """What lies beside the output, but for the unfinished run that `fit` keeps on purpose."""
        kept = {self.command.output, *([f"{self.command.output}.partial"] if self.command.name == "fit" else [])}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in kept)

    def retry(self) -> str | None:
        """Run the command again, as its messages advise; return what is wrong afterwards, or None."""
        exists = os.path.lexists(self.folder / self.command.output)
        partial = (self.folder / f"{self.command.output}.partial").exists()
        argv = self.argv(None, *(["--overwrite"] if exists or self.over else ["--resume"] if partial else []))
        again = fork(argv, self.place / "scratch")
        if again.status != 0:
            return f"the retry ended with {again.status}: {again.stderr}"
        names = sorted(path.name for path in self.folder.iterdir())
        if names != [self.command.output]:
            return f"the retry leaves {names}"
        verdict = self.judge()
        return None if verdict == "new" else f"after the retry the output is {verdict}"

    def point(self, fault: Fault) -> dict[str, Any]:
        """Let the fault befall the command; return what was hit, how it ended, what is left, and what is wrong."""
        self.reset()
        ended = self.run(fault)
        state = self.judge()
        wrong = [state] if state.startswith("torn") else []
        wrong += self.faults_of_kill(ended) if fault.what == "kill" else self.faults_of_error(ended, state)
        left = self.left()
        again = self.retry()
        wrong += [again] if again else []
        call = ended.hit or Call("none", "")
        file = os.path.relpath(call.path, self.folder) if ended.hit else ""
        return {"at": fault.when, "call": call.name, "file": file,
                "status": ended.status, "state": state.split(":")[0], "left": len(left), "wrong": wrong}  # fmt: skip

    @staticmethod
    def faults_of_kill(ended: Ended) -> list[str]:
        return [] if ended.status == -signal.SIGKILL and ended.hit else [f"it was not killed: {ended}"]

    def faults_of_error(self, ended: Ended, state: str) -> list[str]:
        wrong = []
        removal = ended.hit is not None and ended.hit.name in REMOVALS
        told = state == "new" and "in place" in ended.stderr
        harmless = ended.hit is not None and ended.hit.name == "mkdir"  # of a folder that is there
        if ended.hit is None:
            wrong.append("the call was not reached")
        if ended.status == 0:
            if state != "new":
                wrong.append(f"exit 0 and the output is {state}")
            elif not (removal or told or harmless):
                wrong.append(f"exit 0 though {ended.hit} failed")
        elif "error[GS-" not in ended.stderr or "file:" not in ended.stderr:
            wrong.append(f"exit {ended.status} without a message: {ended.stderr}")
        elif "kept:" not in ended.stderr and "try:" not in ended.stderr:
            wrong.append(f"the message does not say what is kept: {ended.stderr}")
        elif state == "new" and not told:
            wrong.append(f"the message does not say that the new output is in place: {ended.stderr}")
        if self.left() and not removal and not told:
            wrong.append(f"junk: {self.left()}")
        return wrong
