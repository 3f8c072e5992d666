"""What `serve --dry-run` and `demo` print: the engine's command line, and the answers side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from gora_serve.cli.render import Summary
from gora_serve.errors import counted, printable
from gora_serve.integrity.record import trained_on_text

if TYPE_CHECKING:
    from gora_serve.demo import DemoResult
    from gora_serve.serving.plan import ServePlan
    from gora_serve.serving.served import ServedAdapter


def plan_summary(plan: ServePlan, warnings: Sequence[str] = ()) -> Summary:
    """The engine's command line and environment, as a shell would take them."""
    value: dict[str, Any] = {
        "argv": list(plan.argv), "environment": dict(plan.environment), "removed": list(plan.removed),
        "url": plan.url, "models": list(plan.models), "lora_layers": plan.lora_layers,
        "trained_on": {adapter.name: adapter.trained_on for adapter in plan.adapters if adapter.trained_on},
        "bound": {adapter.name: adapter.claim or "unbound" for adapter in plan.adapters}, "warnings": list(warnings),
        "adapters": [_served_adapter(adapter) for adapter in plan.adapters], "watched": _watched(plan),
    }  # fmt: skip
    patterns = [name for name in plan.removed if "*" in name]
    lines = [f"# also taken out of the environment: {', '.join(patterns)}"] if patterns else []
    lines += [f"# LoRA layers: {plan.lora_layers}"] if plan.serves_adapters else []
    lines += [f"# {name}: {trained_on_text(record)}" for name, record in value["trained_on"].items()]
    if watched := value["watched"]:
        room = f"room for {counted(watched['max_adapters'], 'adapter')} up to rank {watched['max_rank']}"
        lines.append(f"# watched: {watched['directory']}, {len(watched['found'])} to be served now, {room}")
    return Summary(value, [*lines, *_command_lines(plan)])


def _command_lines(plan: ServePlan) -> list[str]:
    """The command with its environment, an option a line, to be pasted into a shell; the longest setting stands last
    of all settings."""
    removed = [f"-u {name}" for name in plan.removed if "*" not in name]
    settings = [f"{name}={shlex.quote(text)}" for name, text in plan.environment.items()]
    options: list[list[str]] = [[]]
    start = plan.argv.index("serve")
    for word in plan.argv[start:]:
        options += [[]] if word.startswith("-") else []
        options[-1].append(word)
    options[0] = [*plan.argv[:start], *options[0]]
    pieces = ["env", *removed, *sorted(settings, key=len), *map(shlex.join, options)]
    return [f"{'  ' if index else ''}{piece} \\" for index, piece in enumerate(pieces[:-1])] + [f"  {pieces[-1]}"]


def _watched(plan: ServePlan) -> dict[str, Any] | None:
    if plan.watched is None:
        return None
    room = plan.watched.room
    return {
        "directory": str(plan.watched.folder), "found": list(plan.watched.found), "max_adapters": room.adapters,
        "max_rank": room.rank, "target_modules": None if room.targets is None else sorted(room.targets),
    }  # fmt: skip


def _served_adapter(adapter: ServedAdapter) -> dict[str, Any]:
    return {
        "name": adapter.name, "source": str(adapter.source), "path": str(adapter.path), "max_rank": adapter.max_rank,
        "scales": list(adapter.scales) if adapter.scales else None,
        "canary": "fingerprint" if adapter.canary else "differs from the base",
    }  # fmt: skip


def demo_summary(result: DemoResult) -> Summary:
    """The answers side by side, and exact match before and after."""

    models = list(result.answers[0].answers)
    table = Table("task", "unseen prompt", "right answer", *(f"{model} says" for model in models), show_lines=True)
    for answer in result.answers:
        prompt = answer.prompt.split("\n\n")[0]
        cells = [answer.task, prompt, answer.expected, *(answer.answers[model] for model in models)]
        table.add_row(*(_shortened(cell) for cell in cells))
    scores = Table("task", "exact match, base", "exact match, adapter")
    for task, (before, after) in result.exact.items():
        scores.add_row(task, f"{before:.2f}", f"{after:.2f}")
    total = sum(result.seconds.values())
    lines = [f"wrote {result.folder}: base, runs, adapters, demo.json", f"{total:.0f} seconds; base unchanged"]
    return Summary({"demo": str(result.folder), **result.to_json()}, lines, [table, scores])


def _shortened(text: str, limit: int = 100) -> Text:
    text = " ".join(text.split())
    return Text(printable(text if len(text) <= limit else text[: limit - 1] + "…"))
