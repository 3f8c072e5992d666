"""Reading the folder of a run, finished or not, into one frozen value. No formula and no markup here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gora_serve.errors import InputError, UsageError
from gora_serve.integrity.binding import check_folder
from gora_serve.integrity.canonical import is_unicode, parse_json
from gora_serve.integrity.reading import naming_inputs
from gora_serve.integrity.staging import is_held, partial_of
from gora_serve.report.numbers import Point
from gora_serve.report.record import Record
from gora_serve.training.run_files import (
    GAMMA_SCHEMA,
    RANKS_SCHEMA,
    RUN_SCHEMA,
    probe_shapes,
    read_object,
    read_probe,
    standing,
)

MOST_RUNS = 24  # that colour, dash and mark tell apart
METRICS_LIMIT = 2**28  # bytes of a metrics.jsonl
Shape = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """What a run left. Parts that it does not have (yet) are None or empty.

    label: what the page calls it. record: run.json; ranks and gamma: those files. status: run.json's, or interrupted.
    losses and evaluations: by step, None where the file has no finite number. tokens, seconds: of training, as the last
    line of metrics.jsonl has them. shapes: (out, in) by module. updates: |dW| of the trained adapter by module,
    Frobenius.
    """

    folder: Path
    label: str
    record: Record
    status: str = "unknown"
    losses: Sequence[Point] = ()
    evaluations: Sequence[Point] = ()
    base_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    ranks: Record | None = None
    gamma: Record | None = None
    adapter_root: str | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    updates: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return self.status == "complete"

    @property
    def is_resumed(self) -> bool:
        return self.record.whole("resumed_from") is not None

    @property
    def method(self) -> str:
        return self.record.part("config").part("train").text("method") or "unknown"

    @property
    def base(self) -> str:
        return self.record.part("base").text("name") or "unknown"

    @property
    def final_loss(self) -> float | None:
        """The last loss on the evaluation rows."""
        return self.evaluations[-1][1] if self.evaluations else None

    @property
    def module_ranks(self) -> dict[str, int]:
        """Rank by module path, as ranks.json has them."""
        if self.ranks is None:
            return {}
        inner = self.ranks.part("ranks")
        return {path: inner.whole(path) or 0 for path in inner.value}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in this order. Raises UsageError for one twice (GS-241) or too many (GS-242), and as `read_run`."""
    if not 1 <= len(folders) <= MOST_RUNS:
        raise UsageError(
            "a page holds at most so many runs", code="GS-242", expected=f"1 to {MOST_RUNS}", actual=len(folders),
            hint="make several pages",
        )  # fmt: skip
    found = [find_run(folder) for folder in folders]
    for index, folder in enumerate(found):
        if any(folder.resolve() == earlier.resolve() for earlier in found[:index]):
            raise UsageError("this run is named twice", code="GS-241", file=folder, hint="name every run once")
    with naming_inputs():
        return [read_run(folder, label) for folder, label in zip(found, labels(found), strict=True)]


def find_run(folder: Path) -> Path:
    """Return the folder itself, or its .partial where only that is there. Raises UsageError (GS-240)."""
    for place in (folder, partial_of(folder) if folder.name not in ("", "..") else folder):
        if (place / "run.json").is_file():
            return place
    raise UsageError(
        "no run is here: there is no run.json", code="GS-240", file=folder,
        hint="give the folder that fit --output named, or its .partial",
    )  # fmt: skip


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        found = ["/".join(folder.parts[-depth:]) or str(folder) for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]


def read_run(folder: Path, label: str) -> Run:
    """Read one run. An adapter that is there must agree with its seal.

    Raises InputError for a file of another kind (GS-379) or with odd values (GS-3380, GS-3381), MismatchError for a
    damaged adapter, MachineError for what cannot be read.
    """
    held = is_held(folder)
    record = Record(read_object(folder / "run.json", RUN_SCHEMA), folder / "run.json")
    losses, evaluations, base_loss, last = read_metrics(folder / "metrics.jsonl")
    has_probe = (folder / "probe" / "probe.json").is_file()
    shapes = probe_shapes(read_probe(folder)) if has_probe else {}
    root, measured, updates = _read_updates(folder / "adapter")
    return Run(
        folder, label, record, standing(record.text("status"), held=held) or "unknown", losses, evaluations, base_loss,
        tokens=last.whole("tokens"), seconds=last.number("seconds"),
        ranks=_optional(folder / "ranks.json", RANKS_SCHEMA), gamma=_optional(folder / "gamma.json", GAMMA_SCHEMA),
        adapter_root=root, shapes={**shapes, **measured}, updates=updates,
    )  # fmt: skip


def _optional(file: Path, schema: str) -> Record | None:
    return Record(read_object(file, schema), file) if file.is_file() else None


def read_metrics(file: Path) -> tuple[list[Point], list[Point], float | None, Record]:
    """Return the losses and evaluation losses by step, the base's, and the last training line; a torn line at the end
    of a run that is being written, or was killed, is passed over.
    """
    losses: list[Point] = []
    evaluations: list[Point] = []
    base, last = None, Record({}, file)
    for line in _lines(file):
        step = line.whole("step")
        if step is None:
            raise line.malformed("step", "a whole number", None)
        if "loss" in line.value:
            losses.append((step, line.number("loss")))
            last = line
        if "eval_loss" in line.value:
            evaluations.append((step, line.number("eval_loss")))
        base = line.number("base_eval_loss") if "base_eval_loss" in line.value else base
    return losses, evaluations, base, last


def _lines(file: Path) -> list[Record]:
    if not file.is_file():
        return []
    size = file.stat().st_size
    if size > METRICS_LIMIT:
        raise InputError(
            "this file is too large", code="GS-3381", file=file, expected=f"at most {METRICS_LIMIT} bytes",
            actual=f"{size} bytes", hint="is this the right file?",
        )  # fmt: skip
    whole = file.read_bytes().split(b"\n")[:-1]  # what follows the last line end is torn, or nothing
    return [_line(raw, number, file) for number, raw in enumerate(whole, 1)]


def _line(raw: bytes, number: int, file: Path) -> Record:
    try:
        value = parse_json(raw, file)
    except InputError as err:
        value = err
    if not isinstance(value, dict):
        raise InputError(
            f"line {number} is no line of fit's", code="GS-3381", file=file, expected="a JSON object",
            actual=raw[:80].decode("utf-8", "replace"), hint="delete the line",
        ) from (value if isinstance(value, InputError) else None)  # fmt: skip
    return Record(value, file, f"line {number}")


def _read_updates(folder: Path) -> tuple[str | None, dict[str, Shape], dict[str, float]]:
    """Return adapter root, (out, in) and |dW| of every module of a trained adapter, whose seal is checked."""
    if not folder.is_dir():
        return None, {}, {}
    sealed = check_folder(folder)
    from gora_serve.adapter.format import read_adapter
    from gora_serve.adapter.linalg import norm

    adapter = read_adapter(folder)
    shapes, updates = {}, {}
    for path in adapter.modules:
        factors = adapter.modules[path]
        shapes[path], updates[path] = factors.shape, norm(factors)
    root = sealed.get("adapter_root")
    return (root if isinstance(root, str) and is_unicode(root) else None), shapes, updates
