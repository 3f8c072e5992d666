"""The command that repeats a run, out of the settings that run.json holds."""

from __future__ import annotations

from dataclasses import asdict
from shlex import quote
from typing import Any

from gora_serve.config import FitConfig, RankConfig, TrainConfig
from gora_serve.fit_options import OPTIONS, SWITCHES
from gora_serve.report.runs import Run

DEFAULTS = {
    f"{stage}.{name}": value for stage, part in asdict(FitConfig()).items() for name, value in part.items()
}  # fmt: skip


def settings_of(run: Run) -> dict[str, Any]:
    """Return every setting of the run, as "stage.name"; the mixed precision that it had, also where its environment
    gave that.
    """
    found: dict[str, Any] = {}
    for stage, part in run.record.parts("config"):
        found |= {f"{stage}.{name}": value for name, value in part.value.items()}
    if (precision := run.record.text("mixed_precision") or "no") != "no":
        found["train.mixed_precision"] = precision
    return found


def lines_of(run: Run, *, whole: bool) -> list[str]:
    """Return the command, an option a line: all settings, or those that are not this version's defaults."""
    chosen = settings_of(run)
    if whole:
        taken = _taken(run)
        chosen = {name: taken.get(name) if value is None else value for name, value in chosen.items()}
    else:
        chosen = {name: value for name, value in chosen.items() if _plain(DEFAULTS.get(name)) != _plain(value)}
    processes = run.record.whole("processes") or 1
    start = "gora-serve" if processes == 1 else f"accelerate launch --num_processes {processes} -m gora_serve"
    return [
        f"{start} fit {quote(_base(run))}",
        *_files(run),
        *(line for one in chosen for line in _option(one, chosen[one])),
    ]


def _taken(run: Run) -> dict[str, Any]:
    """Return the values that settings take which are left open."""
    ranks, train = (run.record.part("config").part(name) for name in ("ranks", "train"))
    bounds = RankConfig(ranks.whole("rank") or RankConfig.rank)
    return {
        "ranks.rank_min": bounds.lowest,
        "ranks.rank_max": bounds.highest,
        "train.lr_ratio": TrainConfig(method="gora" if train.text("method") == "gora" else "lora").ratio,
        "train.epochs": None if train.whole("steps") else 1.0,
        "train.mixed_precision": run.record.text("mixed_precision"),
    }


def without_option(run: Run) -> dict[str, Any]:
    """Return the settings that differ from the defaults and that the command line has no option for."""
    known = OPTIONS.keys() | SWITCHES.keys()
    return {
        name: value
        for name, value in settings_of(run).items()
        if name not in known and _plain(DEFAULTS.get(name)) != _plain(value)
    }


def _base(run: Run) -> str:
    base = run.record.part("base")
    revision = base.text("revision")
    return f"{run.base}@{revision}" if revision else run.base


def _files(run: Run) -> list[str]:
    """Data and output. Ranks that were given are those of the run's own ranks.json."""
    lines = []
    for option, name in (("--data", "data"), ("--eval-data", "eval_data")):
        data = run.record.part(name)
        given = data.text("given") or data.text("name")
        lines += [f"{option} {quote(given)}"] if given else []
    lines += [f"--ranks {quote(str(run.folder / 'ranks.json'))}"] if run.record.text("ranks_file") else []
    return [*lines, f"--output {quote(str(run.folder).removesuffix('.partial'))}"]


def _option(name: str, value: object) -> list[str]:
    if name in SWITCHES:
        word = SWITCHES[name][0 if value else 1]
        return [word] if word else []
    if name not in OPTIONS or value is None:
        return []
    return [f"{OPTIONS[name]} {quote(_word(value))}"]


def _word(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
