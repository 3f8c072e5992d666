"""What people see of `inspect`: a few lines on the whole, a table of an adapter's modules by kind."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.adapter.names import by_kind
from gora_serve.cli.render import Summary
from gora_serve.errors import counted, printable
from gora_serve.training.run_files import GO_ON, INTERRUPTED

if TYPE_CHECKING:
    from gora_serve.inspect import Inspected, Module


def inspect_summary(found: Inspected) -> Summary:
    """What was found; as JSON with every module."""
    tables = [_table(one.modules) for one in (found, found.adapter) if one and one.modules]
    return Summary(found.to_json(), _lines(found), tables)


def _lines(found: Inspected) -> list[str]:
    of_kind = {"adapter": _adapter, "run": _run, "probe": _probe}.get(found.kind, _model)
    return [f"{found.kind} {found.path}", *of_kind(found), *(f"note: {note}" for note in found.notes)]


def _adapter(found: Inspected) -> list[str]:
    facts = found.facts
    lines = [f"type {facts['type']}, init_lora_weights {facts['initialization']}", _sizes(facts)]
    if facts["largest_rank"]:
        fill = f", {facts['slot_fill']:.0%} of its slot is used" if facts["slot_fill"] else ""
        lines.append(
            f"{counted(len(found.modules), 'module')}, ranks up to {facts['largest_rank']}; "
            f"vLLM: --max-lora-rank {facts['max_lora_rank'] or 'none is enough'}{fill}"
        )
    lines += [f"converted from {facts['converted_from']}"] if facts["converted_from"] else []
    lines.append(_base(facts["base"]))
    lines.append("sealed by a manifest: verify proves it" if facts["sealed"] else "no manifest of gora-serve's")
    return lines


def _base(base: Mapping[str, Any]) -> str:
    name = base["name"] or "an unnamed base"
    if base["weights_root"] is None:
        return f"base {name}, not bound: nothing says which bytes"
    return f"bound ({base['claim']}) to {name}, weights {base['weights_root']}"


def _run(found: Inspected) -> list[str]:
    facts = found.facts
    method = f"method {facts['method']}, on {facts['base'].get('name')}"
    lines = [f"{INTERRUPTED}: {GO_ON}", method] if facts["status"] == INTERRUPTED else [f"{facts['status']}, {method}"]
    lines += [f"data {facts['data'].get('name')}, {facts['data'].get('used')} rows used"] if facts["data"] else []
    if facts["checkpoints"]:
        of = f" of {facts['steps']}" if facts["steps"] else ""
        lines.append(f"step {facts['step']}{of}; checkpoints: {', '.join(facts['checkpoints'])}")
    return [*lines, *(_lines(found.adapter) if found.adapter else ["no adapter yet"])]


def _probe(found: Inspected) -> list[str]:
    facts = found.facts
    early = ", stopped early" if facts["stopped_early"] else ""
    return [
        f"{facts['mode']} gradients of {counted(facts['targets'], 'module')}, on {facts['base'].get('name')}",
        f"{facts['steps']} steps, {facts['samples']} rows, {facts['tokens']} tokens{early}; "
        f"importance by {facts['metric']}",
        f"next: gora-serve ranks {shlex.quote(str(found.path))}",
    ]


def _model(found: Inspected) -> list[str]:
    facts = found.facts
    names = ", ".join(facts["architectures"] or ["of no named architecture"])
    layers = f"{facts['layers']} layer{'' if facts['layers'] == 1 else 's'}"  # whatever config.json says
    lines = [f"{names} ({facts['type']}), {layers}, {counted(facts['files'], 'weight file')}", _sizes(facts)]
    if found.kind == "merged model":
        lines.append(f"base {facts['base'].get('repo_id')}, weights {facts['base'].get('weights_root')}")
        lines += [f"with {one['adapter']} ({one['family']}), weight {one['weight']}" for one in facts["adapters"]]
    return lines


def _sizes(facts: Mapping[str, Any]) -> str:
    dtypes = ", ".join(facts["dtypes"])
    numbers = f"{counted(facts['tensors'], 'tensor')}, {facts['parameters']:,} parameters"
    return f"{numbers}, {facts['bytes'] / 1e6:,.1f} MB in {dtypes}"


def _table(modules: Mapping[str, Module]) -> Table:
    table = Table("module", "number", "rank", "scale", "(out, in)")
    for kind, paths in by_kind(modules).items():
        some = [modules[path] for path in paths]
        shapes = sorted({module.shape for module in some})
        table.add_row(
            Text(printable(kind)), str(len(some)), _span(module.rank for module in some),
            _span(module.scale for module in some), str(shapes[0]) + (" and others" if len(shapes) > 1 else ""),
        )  # fmt: skip
    return table


def _span(values: Iterable[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "not known"
    return f"{known[0]:.4g}" if len(known) == 1 else f"{known[0]:.4g} to {known[-1]:.4g}"
