"""What an unfinished run left that a new process may go on from, once it is proved to be the same run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.config import FREE_SETTINGS
from gora_serve.errors import BindingError, GoraError, InputError, listed
from gora_serve.fit_options import with_option
from gora_serve.gora.ranks import RankPlan
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.integrity.binding import check_folder, which_differ
from gora_serve.integrity.known import known_tensors
from gora_serve.integrity.manifest import TensorRecord, differences
from gora_serve.integrity.staging import UNCHANGED
from gora_serve.training.checkpoint import Checkpoint, newest_checkpoint
from gora_serve.training.probe_files import read_statistics
from gora_serve.training.run_files import GAMMA_SCHEMA, RANKS_SCHEMA, RUN_SCHEMA, ranks_json, read_object

log = logging.getLogger(__name__)

ANEW = "start anew with --overwrite, without --resume"
REMADE = f"delete this file, then --resume makes it anew, or {ANEW}"
RUN = "run.json"  # the first file that a run writes
OTHER_GAMMA = "to train with another gamma, give it to a new run: fit --gamma"


@dataclass(frozen=True)
class Left:
    """What a run left: None where a stage was not finished. `ranks` is the content of ranks.json."""

    statistics: GradientStatistics | None = None
    ranks: Mapping[str, Any] | None = None
    gamma: float | None = None
    checkpoint: Checkpoint | None = None


NOTHING = Left()


def pick_up(run: Path, facts: Mapping[str, Any], tensors: Mapping[str, TensorRecord] | None = None) -> Left:
    """Return what the unfinished run at `run` left. `facts` are those of the new process, as run.json records them,
    `tensors` its base's, for the message where the base is another one.

    Raises BindingError (GS-420) naming every setting and input that differs. A damaged probe or checkpoint is passed
    over with a warning.
    """
    if not (run / RUN).exists():  # killed before its first file
        return NOTHING
    before = _read_run(run / RUN)
    check_same(before, facts, run, tensors)
    _warn_of_versions(before, facts, run)
    checkpoint, inputs = newest_checkpoint(run), digests(facts)
    if checkpoint is not None and {**checkpoint.inputs, "gamma": None} != {**inputs, "gamma": None}:
        raise BindingError(
            "a checkpoint of another run lies in the unfinished run", code="GS-422", file=run / "checkpoints", hint=ANEW
        )
    ranks = run / "ranks.json"
    return Left(
        statistics=_statistics(run / "probe"),
        ranks=_read(ranks, RANKS_SCHEMA, hint=REMADE) if ranks.exists() else None,
        gamma=_gamma(run / "gamma.json", inputs),
        checkpoint=checkpoint,
    )


def check_settings(run: Path, config: Mapping[str, Any]) -> None:
    """Raise as `check_same` where the settings alone tell that it is another run: before a model is loaded."""
    if (run / RUN).exists():
        before = _read_run(run / RUN)
        check_same(before, {**before, "config": config}, run)


def _read(path: Path, schema: str, *, hint: str) -> dict[str, Any]:
    """Read a JSON file of the unfinished run. `hint`: what to do about one that cannot be used."""
    try:
        return read_object(path, schema)
    except InputError as err:
        raise err.keeping(UNCHANGED, hint=hint) from err


def _read_run(path: Path) -> dict[str, Any]:
    """Read run.json. Raises InputError (GS-398) where a record in it is no object."""
    value = _read(path, RUN_SCHEMA, hint=ANEW)
    records = {name: value.get(name) for name in ("config", "base", "data", "versions")}
    records |= {"base.roots": records["base"].get("roots")} if isinstance(records["base"], dict) else {}
    records |= {"eval_data": value["eval_data"]} if value.get("eval_data") is not None else {}
    for name, record in records.items():
        if not isinstance(record, dict):
            raise InputError(
                f"{name} of this run.json is malformed", code="GS-398", file=path, expected="an object",
                actual=json.dumps(record), kept=UNCHANGED, hint=ANEW,
            )  # fmt: skip
    return value


def decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a run's numbers, by name: settings without the free ones, and digests of all inputs."""
    config = {name: value for name, value in _flat(facts.get("config", {})) if name not in FREE_SETTINGS}
    found = {"the base's memory_root": facts.get("memory_root")}
    found |= {f"the base's {kind} root": root for kind, root in facts.get("base", {}).get("roots", {}).items()}
    for kind in ("data", "eval_data"):
        summary = facts.get(kind) or {}
        found |= {f"{kind} {key}": summary.get(key) for key in ("sha256", "used")}
    if (precision := facts.get("mixed_precision")) not in (None, "no"):  # older records have none
        found["mixed_precision"] = precision
    return config | found | {name: facts.get(name) for name in ("ranks_file", "processes")}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(item) if isinstance(item, tuple) else item


def check_same(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    run: Path,
    tensors: Mapping[str, TensorRecord] | None = None,
) -> None:
    """Raise BindingError (GS-420) where the records are of different runs, naming what differs."""
    theirs, ours = decisive(before), decisive(now)
    names = [name for name in (*ours, *(theirs.keys() - ours)) if theirs.get(name) != ours.get(name)]
    if names:
        raise BindingError(
            f"the unfinished run differs in: {listed(map(with_option, names))}{_tensors(before, names, tensors)}",
            code="GS-420", file=run, expected=_shown(theirs, names), actual=_shown(ours, names), kept=UNCHANGED,
            hint=f"resume with the settings and inputs of its run.json, or {ANEW}",
        )  # fmt: skip


def _tensors(before: Mapping[str, Any], names: list[str], now: Mapping[str, TensorRecord] | None) -> str:
    """Say which of the base's tensors differ, where its weights do."""
    base = before.get("base", {})
    if now is None or "the base's weights root" not in names:
        return ""
    expected = known_tensors(str(base["roots"].get("weights")), str(base.get("name")))
    return f"; of its weights: {which_differ(None if expected is None else differences(expected, now))}"


def _shown(values: Mapping[str, Any], names: list[str]) -> str:
    return listed(f"{name} {values.get(name)}" for name in names)


def digests(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint records of its run: the digest of the settings, the base's roots, the data's digests."""
    settings = {name: value for name, value in _flat(facts["config"]) if name not in FREE_SETTINGS}
    if settings.get("data.columns") is None:  # runs of before that setting have none
        settings.pop("data.columns", None)
    text = json.dumps({name: float(v) if type(v) is int else v for name, v in settings.items()}, sort_keys=True)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "base": facts["base"]["roots"],
        "data": facts["data"]["sha256"],
        "eval_data": facts["eval_data"]["sha256"] if facts["eval_data"] else None,
    }


def digest_of_ranks(plan: RankPlan | None) -> str | None:
    """Return the SHA-256 of the ranks that the user gave, or None."""
    return hashlib.sha256(json.dumps(sorted(plan.ranks.items())).encode()).hexdigest() if plan else None


def check_ranks(left: Left, plan: RankPlan, run: Path) -> None:
    """Raise BindingError (GS-423) if the ranks.json of the unfinished run is not what its probe gives."""
    if left.ranks is not None and left.ranks != ranks_json(plan):
        raise BindingError(
            "the ranks.json of the unfinished run was changed", code="GS-423", file=run / "ranks.json",
            hint="to train with other ranks, give the file to a new run: fit --ranks",
        )  # fmt: skip


def _warn_of_versions(before: Mapping[str, Any], facts: Mapping[str, Any], run: Path) -> None:
    for name, now in {**facts["versions"], "device": facts["device"]}.items():
        was = before.get("device") if name == "device" else before["versions"].get(name)
        if was != now:
            log.warning("%s began with %s %s and goes on with %s: the numbers may differ", run, name, was, now)


def _statistics(folder: Path) -> GradientStatistics | None:
    if not folder.exists():
        return None
    try:
        check_folder(folder)
        return read_statistics(folder)
    except GoraError as err:
        log.warning("%s is damaged (%s); probing again", folder, err.what)
        return None


def seal_gamma(value: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of gamma.json, without its seal, and of the run's inputs (`digests`)."""
    content = {name: item for name, item in value.items() if name != "seal"}
    return hashlib.sha256(json.dumps([content, inputs], sort_keys=True).encode()).hexdigest()


def check_gamma(left: Left, gamma: float, run: Path) -> None:
    """Raise BindingError (GS-424) if the checkpoint that the run goes on from was trained from another gamma."""
    began = left.checkpoint.inputs.get("gamma") if left.checkpoint else gamma
    if began != gamma:
        raise BindingError(
            "the checkpoints of the unfinished run began with another gamma", code="GS-424", file=run / "checkpoints",
            expected=began, actual=gamma, hint=f"{OTHER_GAMMA}, or {ANEW}",
        )  # fmt: skip


def _gamma(path: Path, inputs: Mapping[str, Any]) -> float | None:
    if not path.exists():
        return None
    value = _read(path, GAMMA_SCHEMA, hint=REMADE)
    gamma = value.get("gamma")
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not (math.isfinite(gamma) and gamma >= 0):
        raise InputError(
            "not a gamma", code="GS-393", file=path, expected="a number of 0 or more", actual=gamma, hint=REMADE
        )
    if value.get("seal") != seal_gamma(value, inputs):
        raise BindingError(
            "the gamma.json of the unfinished run was changed", code="GS-424", file=path, kept=UNCHANGED,
            hint=f"{OTHER_GAMMA}; to keep this one: {REMADE}",
        )  # fmt: skip
    return float(gamma)
