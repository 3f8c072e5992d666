"""The JSON files of a run folder: probe.json, ranks.json, run.json. No torch, so `ranks` stays instant.

Schemas are in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gora_serve.config import IMPORTANCES
from gora_serve.errors import BindingError, InputError
from gora_serve.gora.ranks import RankPlan, Shape
from gora_serve.integrity.canonical import read_json

PROBE_SCHEMA = "gora-serve/probe/1"
RANKS_SCHEMA = "gora-serve/ranks/1"
RUN_SCHEMA = "gora-serve/run/1"
GAMMA_SCHEMA = "gora-serve/gamma/1"

INTERRUPTED = "interrupted"  # of a run that says it is running, and that no process holds
GO_ON = "no process holds it; fit --resume goes on"

PROBE_AGAIN = "probe again: gora-serve probe"
REMAKE = "correct the value, or make the file anew: gora-serve ranks"


def read_object(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON object of this schema. Raises MachineError if it is missing, InputError if it is another."""
    value = read_json(path)
    found = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(value, dict) or found != schema:
        raise InputError(
            "another kind of file",
            code="GS-379",
            hint="give the file that expected: names",
            file=path,
            expected=schema,
            actual=found,
        )
    return value


def standing(status: str | None, *, held: bool) -> str | None:
    """Return how a run stands whose run.json has this status. held: whether a process held it before that was read."""
    return INTERRUPTED if status == "running" and not held else status


def read_probe(folder: Path) -> dict[str, Any]:
    """Read probe.json out of a probe folder or a run folder, checked."""
    inner = folder / "probe" / "probe.json"
    path = inner if inner.is_file() else folder / "probe.json"
    value = read_object(path, PROBE_SCHEMA)
    modules = value.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise InputError("the probe names no module", code="GS-340", hint=PROBE_AGAIN, file=path)
    for name, module in modules.items():
        shape = module.get("shape") if isinstance(module, dict) else None
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(
                "not a shape",
                code="GS-340",
                hint=PROBE_AGAIN,
                file=path,
                tensor=name,
                expected="[out, in]",
                actual=shape,
            )
    return value


def probe_importances(probe: Mapping[str, Any], metric: str | None) -> dict[str, float]:
    """Return the importance of each module by `metric`; None means the one that the probe was run for."""
    decisive = probe.get("metric", IMPORTANCES[0])
    metric = metric or decisive
    values = {}
    for name, module in probe["modules"].items():
        found = module.get("importance") if metric == decisive else module.get("others", {}).get(metric)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise InputError(
                f"the probe did not measure {metric}", code="GS-341", tensor=name,
                hint=f"probe again with --importance {decisive},{metric}",
            )  # fmt: skip
        values[name] = float(found)
    return values


def probe_shapes(probe: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: (module["shape"][0], module["shape"][1]) for name, module in probe["modules"].items()}


def ranks_json(plan: RankPlan) -> dict[str, Any]:
    """Return the content of ranks.json."""
    return {
        "schema": RANKS_SCHEMA,
        "rule": plan.rule,
        "rank": plan.rank,
        "rank_min": plan.rank_min,
        "rank_max": plan.rank_max,
        "lora_parameters": plan.lora_parameters,
        "parameters": plan.parameters,
        "ranks": dict(plan.ranks),
    }


def read_ranks(path: Path, shapes: Mapping[str, Shape]) -> RankPlan:
    """Read a ranks.json, perhaps edited by hand, for modules of these shapes.

    Modules that it leaves out get rank 0. Raises InputError for a rank that is no whole number from 0 to
    min(out, in), and BindingError for a module that is not among the targets.
    """
    value = read_object(path, RANKS_SCHEMA)
    ranks = value.get("ranks")
    if not isinstance(ranks, dict):
        raise InputError("ranks is not an object", code="GS-342", hint=REMAKE, file=path)
    for name, rank in ranks.items():
        if name not in shapes:
            raise BindingError(
                "ranks.json names a module that is not a target", code="GS-410", file=path, tensor=name,
                hint="check --targets and BASE",
            )  # fmt: skip
        if type(rank) is not int or not 0 <= rank <= min(shapes[name]):
            raise InputError(
                "not a rank", code="GS-342", file=path, tensor=name, expected=f"0 to {min(shapes[name])}",
                hint=REMAKE,
                actual=rank,
            )  # fmt: skip
    full = {name: ranks.get(name, 0) for name in shapes}
    if not any(full.values()):
        raise InputError("every rank is 0: nothing would be trained", code="GS-342", hint=REMAKE, file=path)
    reference = value.get("rank")
    highest = max(full.values())
    rank = reference if type(reference) is int and reference > 0 else highest
    return RankPlan("file", rank, min(full.values()), highest, full, dict(shapes))
