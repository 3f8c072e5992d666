"""What people see: progress bars on standard error, result tables on standard output, or the same as JSON."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gora_serve.errors import GoraError, MachineError, printable
from gora_serve.integrity.levels import Level
from gora_serve.integrity.record import ASSERTED, trained_on_text
from gora_serve.progress import Listener, Progress, silent

if TYPE_CHECKING:
    from rich.table import Table

    from gora_serve.adapter.factors import Adapter
    from gora_serve.bind import Bound
    from gora_serve.integrity.bases import Base
    from gora_serve.integrity.manifest import Manifest
    from gora_serve.integrity.verify import Verified
    from gora_serve.training.export import Exported

QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Summary:
    """A result: lines to show, tables to show, and the same as a JSON value."""

    value: Mapping[str, Any]
    lines: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def emit(summary: Summary, *, as_json: bool) -> None:
    """Print a result on standard output. Only the first of several processes speaks."""
    if _speaks():
        with _reader_may_go():
            _print(summary, as_json=as_json)


def answer(summary: Summary, refused: GoraError | None, *, as_json: bool) -> int:
    """Print what a check found and, where the answer is no, the error that says so: with --json among the same fields.

    Returns the exit status.
    """
    told = refused.to_json() if refused else {}
    emit(replace(summary, value={**summary.value, **told}), as_json=as_json)
    for line in str(refused).splitlines() if refused else ():
        say(line)
    return refused.exit_code if refused else 0


def _print(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(finite(summary.value), indent=2, allow_nan=False))
        return
    for line in summary.lines:
        print(printable(line))
    if summary.tables:
        from gora_serve.cli.tables import print_tables  # rich takes 30 ms to import

        print_tables(summary.tables)


def finite(value: object) -> object:
    """Return a JSON value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


@contextmanager
def _reader_may_go() -> Iterator[None]:
    """Let output that nobody reads any more (`| head`) vanish. It is no error: 1 means that bytes differ.

    Raises MachineError (GS-507) where standard output is closed, or its disk is full.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    except OSError as err:
        discard(sys.stdout)
        raise MachineError(
            f"the result cannot be printed: {err.strerror or err}", code="GS-507", file="standard output",
            kept="the work is done, and what it wrote is in place",
            hint="redirect standard output to a file that can be written",
        ) from err  # fmt: skip


def discard(stream: TextIO | None) -> None:
    """Send what is still buffered for a standard stream, and what follows, nowhere."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Print a line of talk on standard error."""
    if _speaks():
        _talk(printable(text))


def _talk(text: str) -> None:
    """Print on standard error, if anybody can hear it: a full disk there ends no work."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def watching() -> Iterator[Listener]:
    """Show progress on standard error while open: bars on a terminal, a line now and then elsewhere."""
    quiet_libraries()
    if not _speaks():
        yield silent
    elif sys.stderr is not None and sys.stderr.isatty():
        from gora_serve.cli.bars import bars

        with bars() as listen:
            yield listen
    else:
        yield _lines()


def quiet_libraries() -> None:
    """Keep what libraries say of their progress off standard error, before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops"):  # PEFT imports it, and it talks of kernels
        logging.getLogger(name).setLevel(logging.ERROR)


def _lines() -> Listener:
    shown: dict[str, float] = {}

    def listen(event: Progress) -> None:
        now = time.monotonic()
        last = event.done == event.total
        if not last and now - shown.get(event.stage, now - QUIET_SECONDS) < QUIET_SECONDS:
            return
        shown[event.stage] = now
        say(f"{event.stage} {amount(event)} {numbers(event.fields)}".rstrip())

    return listen


def amount(event: Progress) -> str:
    """How far a stage is: bytes are told in MB."""
    if event.stage == "hash":
        return f"{event.done / 1e6:.0f}/{event.total / 1e6:.0f} MB"
    return f"{event.done}/{event.total}"


def numbers(fields: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in fields.items())


def export_summary(done: Exported, form: str, dtype: str) -> Summary:
    """An export: where it is, its root, ranks and parameters."""
    adapter: Adapter = done.adapter
    ranks = list(adapter.ranks.values())
    value = {
        "adapter": str(done.folder), "adapter_root": done.root, "form": form, "dtype": dtype,
        "modules": len(ranks), "parameters": adapter.parameters, "max_rank": max(ranks), "canary": done.canary,
    }  # fmt: skip
    lines = [
        f"wrote {done.folder}",
        f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}, {adapter.parameters:,} parameters, form {form}",
        f"adapter root {done.root}",
        f"fingerprint of its answers: {done.canary}",
    ]
    if done.gguf:
        value["gguf"] = asdict(done.gguf)
        lines.append(f"{done.gguf.file} for llama.cpp ({done.gguf.architecture}), error {done.gguf.error:.1e}")
    return Summary(value, lines)


def hash_summary(base: Base, manifest: Manifest, outputs: Sequence[Path], level: Level) -> Summary:
    """The roots of a base; as JSON, the whole manifest."""
    roots = manifest.roots
    lines = [
        f"weights   {roots.weights}",
        f"config    {roots.config or 'no config.json'}",
        f"tokenizer {roots.tokenizer or 'no tokenizer'}",
        f"{len(manifest.tensors)} tensors, {sum(record.nbytes for record in manifest.tensors.values()):,} bytes",
    ]
    lines += [f"{base.name} at commit {base.revision}"] if base.revision else []
    lines.append(f"level {level.value}" + ("" if level.verifies else UNVERIFIED))
    lines += [f"wrote {output}" for output in outputs]
    return Summary({"base": str(base.path), "level": level.value, **manifest.to_json()}, lines)


UNVERIFIED = ": digests of files that stand as they stood when they were hashed; not verified"


def verify_summary(done: Verified) -> Summary:
    said = f"verified {done.path}: every byte hashed" if done.level.verifies else f"unchanged {done.path}"
    lines = [f"{said} ({done.level.value}{'' if done.level.verifies else UNVERIFIED})", f"root {done.root}"]
    if done.base and not done.warnings:
        lines.append(f"belongs to {done.base}" + (" (asserted, not trained)" if done.claim == ASSERTED else ""))
    elif not done.base and done.bound_to:
        how = f"bound to base {done.bound_to.weights} ({done.claim}), which was not checked: give --base"
        made = f"merged on base {done.bound_to.weights}, which was not checked: give --base BASE -a ADAPTER"
        lines.append(how if done.claim else made)
    lines += [trained_on_text(done.trained_on)] if done.trained_on else []
    return Summary(done.to_json(), lines + [f"warning: {warning}" for warning in done.warnings])


def bind_summary(done: Bound) -> Summary:
    """A binding that a person asserted: what was written, what was left behind."""
    lines = [
        f"wrote {done.folder}",
        f"{done.modules} modules, asserted to belong to {done.base.name}: {done.roots.weights}",
        f"adapter root {done.root}",
    ]
    lines += [f"left out: {', '.join(done.left_out)}"] if done.left_out else []
    return Summary(done.to_json(), lines)
