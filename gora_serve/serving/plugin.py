"""What `serve` tells the plugin in the engine's processes, by environment variables, and whether it can run at all.

`gora_serve/vllm_plugin` reads the same names and values. Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gora_serve.errors import BindingError

GROUP, PLUGIN = "vllm.general_plugins", "gora_serve"  # the entry point
SWITCH, RANKS = "GORA_SERVE_PLUGIN", "GORA_SERVE_LORA_RANKS"
TO_COPY = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # what vLLM hands on to workers that Ray starts
ON = "1"
TESTED = ((0, 32),)  # versions of vLLM whose LoRA layers are those that the plugin was tested with
# Linux takes no variable of more than 128 KiB; ranks that do not fit are left out, and buffers have vLLM's size.
LONGEST = 120_000
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Declared:
    """The adapters that the buffers are made for: how many, and by module path the largest of their ranks and the sum.

    headroom: the rank in any module up to which an adapter that comes later fits into a slot that none of them has.
    """

    adapters: int
    headroom: int
    modules: Mapping[str, tuple[int, int]]


def declare(ranks: Sequence[Mapping[str, int]], headroom: int) -> Declared:
    """Count the ranks of adapters, given by module path."""
    modules: dict[str, tuple[int, int]] = {}
    for adapter in ranks:
        for module, rank in adapter.items():
            largest, total = modules.get(module, (0, 0))
            modules[module] = (max(largest, rank), total + rank)
    return Declared(len(ranks), headroom, modules)


def plugin_environment(declared: Declared | None) -> dict[str, str]:
    """Return the variables that turn the plugin on. Without `declared`, buffers have the size that vLLM gives them."""
    text = dump_declared(declared) if declared else ""
    always = {SWITCH: ON, "VLLM_PLUGINS": PLUGIN, TO_COPY: f"{SWITCH},{RANKS}"}
    return always | ({RANKS: text} if 0 < len(text) <= LONGEST else {})


def dump_declared(declared: Declared) -> str:
    """Return JSON. Modules that differ in their first number alone share an entry: 30 layers are one line."""
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    for module, ranks in sorted(declared.modules.items()):
        number = _NUMBER.search(module)
        where = module if number is None else f"{module[: number.start()]}*{module[number.end() :]}"
        layers.setdefault(where, {})["" if number is None else number[0]] = ranks
    told = {"adapters": declared.adapters, "headroom": declared.headroom, "modules": layers}
    return json.dumps(told, separators=(",", ":"))


def load_declared(text: str) -> Declared:
    """Read what `dump_declared` wrote. Raises BindingError (GS-4803)."""
    try:
        told = json.loads(text)
        modules = {
            where.replace("*", number): _pair(ranks)
            for where, layers in told["modules"].items()
            for number, ranks in layers.items()
        }
        return Declared(_count(told["adapters"]), _count(told["headroom"]), modules)
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise BindingError(
            f"{RANKS} cannot be read: {err}", code="GS-4803", hint="leave it to `gora-serve serve`"
        ) from err


def why_stock(engine_version: str) -> str | None:
    """Return why this engine would run without the plugin, None where it can have it."""
    if tuple(int(part) for part in re.findall(r"\d+", engine_version)[:2]) not in TESTED:
        tested = ", ".join(".".join(map(str, version)) for version in TESTED)
        return f"it is tested with vLLM {tested} only, not with {engine_version}"
    if not any(point.name == PLUGIN for point in importlib.metadata.entry_points(group=GROUP)):
        return "gora-serve's installation is older than its plugin: install it again (pip install gora-serve)"
    return None


def _pair(ranks: Any) -> tuple[int, int]:
    largest, total = ranks
    return _count(largest), _count(total)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"not a rank: {value!r}")
    return value
