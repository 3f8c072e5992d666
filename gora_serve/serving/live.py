"""A directory whose adapters are served as they come, change and go, while the engine runs.

`LiveAdapters` looks at the directory again and again: what stands still there is examined, copied into the store,
loaded, asked, and only then served; a new version takes the name over; what is gone is withdrawn and unloaded. What is
bad is told once, and nothing else changes for it: an older version of that name goes on being served. The directory is
the only memory, so that after a restart the same adapters are served.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from gora_serve.errors import BindingError, GoraError, MachineError, OutputError, RunError, UsageError
from gora_serve.integrity.reading import unreadable
from gora_serve.serving.adapter_names import check_name, require_free
from gora_serve.serving.admit import Examined, content_in, examine, keep, served_from
from gora_serve.serving.arrivals import Seen, look_at
from gora_serve.serving.canary import NotItselfError
from gora_serve.serving.changes import (
    NEVER,
    Stamp,
    Tracked,
    forgotten,
    noticed,
    to_load,
    to_remove,
    tried,
)
from gora_serve.serving.engine import Beside, Server
from gora_serve.serving.ledger import Ledger
from gora_serve.serving.loading import Loaded, RunningEngine
from gora_serve.serving.plan import ServePlan, Watched
from gora_serve.serving.preflight import as_fault, refuse
from gora_serve.serving.room import SWAP, require_place, require_room
from gora_serve.serving.served import ServedAdapter, ServedBase
from gora_serve.serving.store import Store, hold
from gora_serve.serving.watch import FileWatch

EVERY = 0.5  # seconds between two looks
SETTLE = 1.0  # seconds that a folder has to stand still before it is read, and to be gone before it is withdrawn
PATIENCE = 5.0  # seconds that it has to stand still before it is called bad: an upload may pause
AGAIN = 60.0  # seconds until what the machine or the engine was in the way of is tried again
LEAVE = 5.0  # seconds for a look that is under way when the server stops


class Say(Protocol):
    """Tells people, and machines: a text, how grave it is, and what it is about."""

    def __call__(self, text: str, *, level: str = "info", **fields: object) -> None: ...


class Running(Protocol):
    """The engine, as far as it is changed: `loading.RunningEngine`."""

    resident: frozenset[int]

    def load(self, adapter: ServedAdapter) -> Loaded: ...
    def withdraw(self, name: str) -> None: ...
    def unload(self) -> None: ...


@dataclass(frozen=True)
class Refused:
    """Why a folder, as it stood, is not served; `told` once that was said."""

    error: GoraError
    stamp: Stamp
    told: bool = False


@dataclass(frozen=True)
class Pace:
    """How long to wait, in seconds, and the clock to wait by."""

    every: float = EVERY
    settle: float = SETTLE
    patience: float = PATIENCE
    clock: Callable[[], float] = time.monotonic


def examined(name: str, seen: Seen, base: ServedBase, *, strict: bool) -> Examined:
    """Return an entry of the directory without faults; raise all that is wrong with it."""
    if seen.problem is not None:
        raise seen.problem
    try:
        check_name(name)
    except UsageError as err:
        raise err.advising("rename the folder") from None
    found = examine(name, seen.path, base, strict=strict)
    refuse(found.faults)
    return found


class LiveAdapters:
    """The directory and what is served of it. As a context it looks from a thread of its own.

    server: what is served beside, whose names are taken. say: for people.
    """

    def __init__(
        self, watched: Watched, server: Server, engine: Running, *,
        say: Say, pace: Pace | None = None, ledger: Ledger | None = None,
    ) -> None:  # fmt: skip
        assert watched.base is not None, "adapters are held to a base"
        self._watched, self._base, self._engine = watched, watched.base, engine
        self._store = Store(watched.store)
        self._server, self._fixed = server, len(server.models) - 1
        self._say, self._pace, self._ledger = say, pace or Pace(), ledger
        self._known: dict[str, Tracked] = {}
        self._served: dict[str, tuple[Loaded, int]] = {}  # with the descriptor that holds its entry in the store
        self._leaving: list[tuple[Loaded, int]] = []
        self._refused: dict[str, Refused] = {}
        self._crowded: set[str] = set()  # of the refused, those that had no place
        self._namesakes: set[str] = set()  # and those whose name another has
        self._complaint = ""
        self._begun, self._caught_up = self._pace.clock(), False
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live adapters", daemon=True)

    # What the server's own loop asks.

    def look(self) -> None:
        """Raise what ended the thread, if something did."""
        if self._failure is not None:
            raise self._failure

    def caught_up(self) -> bool:
        """Return whether everything that stands still in the directory was served or refused."""
        return self._caught_up

    def joined(self, server: Server) -> Server:
        """Return the server with what is served of the directory."""
        ours = [loaded for loaded, _ in list(self._served.values())]  # a copy at once: the thread may add to it
        return replace(
            server, models=(*server.models, *(one.adapter.name for one in ours)),
            checked=(*server.checked, *(one.checked for one in ours)),
            adapters=(*server.adapters, *(one.adapter for one in ours)),
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LEAVE)
        if not self._thread.is_alive():
            self.release()

    def release(self) -> None:
        """Let go of the entries in the store."""
        for _, descriptor in (*self._served.values(), *self._leaving):
            os.close(descriptor)
        self._served, self._leaving = {}, []

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pace.every):
                try:
                    self.step()
                    self._complain("")
                except GoraError as err:  # the directory, or the engine, does not answer: all stays as it is
                    self._complain("; ".join(_lines(err, self._watched.folder)), code=err.code)
                except OSError as err:
                    self._complain(str(err))
        except Exception as err:  # ours: the server's own loop raises it
            self._failure = err

    def _complain(self, text: str, **fields: object) -> None:
        if text != self._complaint and not self._stop.is_set():
            if text:
                self._say(f"warning: {text}; what was served is served", level="warning", **fields)
            else:
                self._say(f"{self._watched.folder} is looked at again")
        self._complaint = text

    # One look.

    def step(self) -> None:
        """Look once, and do what is due. Raises GoraError where directory or engine do not answer."""
        now, settle = self._pace.clock(), self._pace.settle
        seen = look_at(self._watched.folder)
        self._known = noticed(self._known, {name: one.stamp for name, one in seen.items()}, now)
        for name in to_remove(self._known, self._served, now, settle):
            self._remove(name)
        self._unload()
        for name in to_load(self._known, now, settle):
            if self._stop.is_set():
                return
            self._try(name, seen[name])
        self._known = forgotten(self._known, self._served)
        self._report()
        settled = now - self._begun >= settle + self._pace.every
        self._caught_up = self._caught_up or (settled and not to_load(self._known, self._pace.clock(), settle))

    def _remove(self, name: str) -> None:
        self._engine.withdraw(name)
        self._leaving.append(self._served.pop(name))
        self._try_again(self._namesakes)
        if self._ledger:
            self._ledger.removed(name)
        self._say(f"withdrawn: {name}: its folder is gone", model=name)

    def _unload(self) -> None:
        """Unload what is not named any more, as soon as no request uses it."""
        if not self._leaving and len(self._engine.resident) == self._fixed + len(self._served):
            return
        self._engine.unload()
        for one in [one for one in self._leaving if one[0].number not in self._engine.resident]:
            self._leaving.remove(one)
            os.close(one[1])
            left = one[0].adapter
            self._say(f"unloaded: {left.name}, version {_version(left)}", model=left.name)
        if self._fixed + len(self._served) < self._watched.room.adapters:
            self._try_again(self._crowded)

    def _try_again(self, refused: set[str]) -> None:
        """Have these loaded again: what they waited for has come."""
        for name in refused & set(self._known):
            self._known = tried(self._known, name, again=0.0)
        refused.clear()

    def _try(self, name: str, seen: Seen) -> None:
        again = NEVER
        try:
            if len(self._engine.resident) > self._watched.room.adapters + SWAP - 1:
                return  # an older version is still at work: the next look tries again
            self._serve(name, seen)
            if self._refused.pop(name, None) is not None and self._ledger:
                self._ledger.mended(name)
        except GoraError as err:
            again = self._refuse(name, err)
        except OSError as err:  # it went while it was read, or the machine is in the way
            again = self._refuse(name, unreadable(Path(os.fsdecode(err.filename or seen.path)), err))
        self._known = tried(self._known, name, again)

    def _refuse(self, name: str, err: GoraError) -> float:
        """Remember why a folder, as it stands, is not served; return when it is tried again."""
        before, stamp = self._refused.get(name), self._known[name].stamp
        same = before is not None and before.error.code == err.code and before.stamp == stamp
        self._refused[name] = Refused(err, stamp, told=same and before is not None and before.told)
        if isinstance(err, RunError):
            with suppress(GoraError):
                self._engine.unload()  # what it holds now, and nothing on trial
        passing = isinstance(err, MachineError | OutputError | RunError) and not isinstance(err, NotItselfError)
        return self._pace.clock() + AGAIN if passing else NEVER

    def _serve(self, name: str, seen: Seen) -> None:
        """Examine, store, load and publish one adapter; raise why it is not served."""
        self._require_name(name)
        found = examined(name, seen, self._base, strict=self._watched.strict)
        before = self._served.get(name)
        planned = served_from(found, self._store.place(content_in(found)))
        if before is not None and before[0].adapter.path == planned.path:
            return  # touched, and not changed
        require_room(planned, self._watched.room)
        self._require_place(planned)
        adapter = keep(found, self._base, self._store, strict=self._watched.strict)
        descriptor = hold(adapter.path)
        try:
            loaded = self._engine.load(adapter)
        except BaseException:
            os.close(descriptor)
            raise
        self._served[name] = loaded, descriptor
        if before is not None:
            self._leaving.append(before)
        if self._ledger:
            self._ledger.added(adapter, loaded.seconds)
        for warning in found.warnings:
            self._say(f"warning: {warning}", level="warning", model=name)
        what = "a new version is served" if before is not None else "served"
        self._say(f"{what}: {loaded.checked}; version {_version(adapter)}", model=name, root=adapter.root)

    def _require_name(self, name: str) -> None:
        try:
            require_free(name, [*self._server.models, *(other for other in self._served if other != name)])
        except UsageError:
            self._namesakes.add(name)
            raise

    def _require_place(self, adapter: ServedAdapter) -> None:
        if adapter.name in self._served:
            return
        try:
            require_place(adapter, self._fixed + len(self._served), self._watched.room)
        except BindingError:
            self._crowded.add(adapter.name)
            raise

    def _report(self) -> None:
        """Tell people of what is bad, once it has stood still for long enough."""
        now = self._pace.clock()
        for name in self._refused.keys() - self._known.keys():
            del self._refused[name]
            if self._ledger:
                self._ledger.mended(name)
        for name, one in self._refused.items():
            stands = self._known[name].stamp == one.stamp and now - self._known[name].since >= self._pace.patience
            if stands and not one.told:
                self._refused[name] = replace(one, told=True)
                if self._ledger:
                    self._ledger.refused(name, one.error, older=name in self._served)
                older = " (its older version goes on being served)" if name in self._served else ""
                for line in _lines(one.error, self._watched.folder / name):
                    self._say(f"refused: {name}{older}: {line}", level="warning", model=name, code=one.error.code)


def _lines(err: GoraError, path: Path) -> Sequence[str]:
    return err.faults or (str(as_fault(err, path)),)


def watch_directory(plan: ServePlan, say: Say) -> Beside:
    """Return what looks after the directory of a plan beside its server."""

    def beside(server: Server, watch: FileWatch) -> LiveAdapters:
        assert plan.watched is not None, "there is a directory"
        engine = RunningEngine(plan, server.token)
        return LiveAdapters(plan.watched, server, engine, say=say, ledger=watch.ledger)

    return beside


def _version(adapter: ServedAdapter) -> str:
    return adapter.path.name[:12]
