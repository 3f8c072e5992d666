"""LoRA of kohya's sd-scripts and of LyCORIS: .lora_down, .lora_up and .alpha under underscored module paths.

Which of the underscores were dots only the base can say.
"""

from __future__ import annotations

import re
from collections import defaultdict

from converters.foreign import Part, pair_up, refuse_magnitudes, tensors_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.peft_config import LARGEST
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError

PREFIX = re.compile(r"^(lora_unet|lora_te\d?|lycoris)_")
PART = re.compile(r"\.lora_(down|up)\.weight$")
ALPHA = ".alpha"


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoRA of kohya: alpha / r * up @ down per module; where there is no alpha, or it is 0, the scale is 1.

    Raises InputError: GS-3172 for DoRA, GS-3183 for convolutions, GS-3184 for an alpha that is no number; BindingError
    (GS-461) for a name that the base does not have, or has twice.
    """
    base = inputs.need_base("LoRA of kohya, whose module names are underscored,")
    refuse_magnitudes(source, ".dora_scale", "kohya or LyCORIS")
    _refuse_convolutions(source)
    known = spelled(base)
    names: dict[str, str] = {}  # module path -> its underscored name

    def parse(name: str) -> Part | None:
        found = PART.search(name)
        if found is None or not PREFIX.match(name):
            return None
        path = resolve(name[: found.start()], known, base)
        names[path] = name[: found.start()]
        return path, "A" if found.group(1) == "down" else "B"

    pairs = pair_up(source, parse)
    alphas = {path: f"{name}{ALPHA}" for path, name in names.items() if f"{name}{ALPHA}" in source.tensors}
    scales = {path: _scale(source, alphas.get(path), source.tensors.shape(pairs[path].A)[0]) for path in pairs}
    modules = LazyModules(
        pairs, lambda path: LoraFactors(source.tensors[pairs[path].A], source.tensors[pairs[path].B], scales[path])
    )
    applied = tensors_of(pairs.values()) | frozenset(alphas.values())
    return Reading(Adapter(modules, BaseId(""), task_type=None), applied, method="alpha / r * lora_up lora_down")


def spelled(base: BaseWeights) -> dict[str, set[str]]:
    """Return module paths by their underscored spellings: the whole path, and the path without its first part."""
    base.need_model_names()
    found: dict[str, set[str]] = defaultdict(set)
    for path in base.modules():
        for spelling in {path, path.partition(".")[2]} - {""}:
            found[spelling.replace(".", "_")].add(path)
    return found


def resolve(name: str, known: dict[str, set[str]], base: BaseWeights) -> str:
    """Return the module path of an underscored name. Raises BindingError (GS-461) where it is none, or several."""
    spelling = PREFIX.sub("", name)
    paths = known.get(spelling, set())
    found = sorted({path for path in paths if path.replace(".", "_") == spelling} or paths)
    if len(found) != 1:
        raise BindingError(
            "an underscored name is not one module of the base", code="GS-461", file=base.folder, tensor=name,
            expected="one module", actual=" and ".join(found) or "none",
            hint="give the model that this adapter was trained on, one of a pipeline's (unet, text encoder) at a time",
        )  # fmt: skip
    return found[0]


def _refuse_convolutions(source: Source) -> None:
    for name in source.tensors:
        if PART.search(name) and len(source.tensors.shape(name)) != 2:
            raise InputError(
                "LoRA of a convolution", code="GS-3183", file=source.weights, tensor=name, expected="a matrix",
                actual=source.tensors.shape(name), hint="only linear layers are converted: merge it with sd-scripts",
            )  # fmt: skip


def _scale(source: Source, alpha: str | None, rank: int) -> float:
    """Return alpha / rank; alpha is the rank where it is missing or 0 (sd-scripts, networks/lora.py)."""
    if alpha is None:
        return 1.0
    value = source.tensors[alpha].double().flatten()
    if value.numel() != 1 or not abs(float(value)) <= LARGEST:
        raise InputError(
            "alpha is not a finite number", code="GS-3184", file=source.weights, tensor=alpha, expected="one number",
            actual=tuple(source.tensors.shape(alpha)), hint="fetch the adapter again",
        )  # fmt: skip
    return float(value) / rank if value else 1.0
