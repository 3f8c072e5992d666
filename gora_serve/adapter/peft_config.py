"""adapter_config.json: the only file that knows alpha. No torch.

PEFT's scale is alpha / r, or alpha / √r with rsLoRA, where r and alpha of a module come from rank_pattern and
alpha_pattern. Everywhere else in gora-serve a module simply has a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gora_serve.adapter.names import pattern_key
from gora_serve.adapter.path_pattern import compile_key
from gora_serve.errors import InputError

LARGEST = 1e30  # alpha: anything above is no scale, and would overflow in float32


def make_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    base_name: str | None,
    revision: str | None,
    task_type: str | None,
    fan_in_fan_out: bool = False,
    modules_to_save: Sequence[str] = (),
) -> dict[str, Any]:
    """Return an adapter_config.json of standard PEFT keys in which each module has its rank and its scale.

    `r` is the largest rank, because vLLM checks it against its own maximum even when every module overrides it.
    `init_lora_weights` is true, whatever the method: vLLM refuses words it does not know. Patterns are written
    where modules differ, with one key for each module; rsLoRA where it makes alpha_pattern superfluous.
    """
    alphas, use_rslora = _spell_alpha(ranks, scales)
    widest = max(ranks, key=lambda path: ranks[path])
    return {
        "alpha_pattern": _pattern(alphas),
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alphas[widest],
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": ranks[widest],
        "rank_pattern": _pattern(ranks),
        "revision": revision,
        "target_modules": sorted(ranks),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def _spell_alpha(ranks: Mapping[str, int], scales: Mapping[str, float]) -> tuple[dict[str, int | float], bool]:
    """Return alpha of each module and use_rslora: one whole alpha where there is one, else alphas without rsLoRA."""
    plain = {path: _alpha(scales[path], rank, False) for path, rank in ranks.items()}
    stabilized = {path: _alpha(scales[path], rank, True) for path, rank in ranks.items()}
    for alphas, use_rslora in ((plain, False), (stabilized, True)):
        values = set(alphas.values())
        if len(values) == 1 and isinstance(values.pop(), int):
            return alphas, use_rslora
    return plain, False


def _alpha(scale: float, rank: int, use_rslora: bool) -> int | float:
    alpha = scale * (math.sqrt(rank) if use_rslora else rank)
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    if len(set(values.values())) == 1:
        return {}
    return {pattern_key(path): values[path] for path in sorted(values)}


def read_scales(config: Mapping[str, Any], ranks: Mapping[str, int], *, file: Path) -> dict[str, float]:
    """Return the scale of each module of an adapter that gora-serve wrote, given the ranks of its tensors.

    Pattern keys are compared as literals with those that `make_config` writes: nothing out of the file is run as
    a regular expression. Raises InputError for other keys, for ranks that disagree with the tensors and for
    content that this form never has.
    """
    _refuse_unsupported(config, file)
    keys = {pattern_key(path): path for path in ranks}
    patterns: dict[str, dict[str, Any]] = {}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        foreign = [key for key in pattern if key not in keys] if isinstance(pattern, dict) else pattern
        if foreign or not isinstance(pattern, dict):
            raise InputError(
                f"{name} is not one that gora-serve wrote", code="GS-353", file=file, actual=foreign,
                hint="gora-serve convert ADAPTER --base BASE --output DIR reads the patterns of any tool",
            )  # fmt: skip
        patterns[name] = {keys[key]: value for key, value in pattern.items()}
    scales = {}
    for path, rank in ranks.items():
        declared = patterns["rank_pattern"].get(path, config.get("r"))
        if declared != rank:
            raise InputError(
                "the configured rank is not the tensor's", code="GS-354", file=file, tensor=path,
                expected=declared, actual=rank, hint="export the adapter again",
            )  # fmt: skip
        alpha = patterns["alpha_pattern"].get(path, config.get("lora_alpha"))
        scales[path] = scale_of(alpha, rank, config, path, file)
    return scales


def is_safe_pattern(key: str) -> bool:
    """Tell whether a pattern key is of the kind that cannot run for ever: engines apply it to each module as it is."""
    return compile_key(key) is not None


def pattern_value(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return what rank_pattern or alpha_pattern gives a module, else `default`.

    PEFT's rule (`get_pattern_key`): a key is a regular expression for the end of the path, starting at a dot; the first
    match wins. Keys that are not safe (`is_safe_pattern`) match nothing.
    """
    return next(iter(pattern_values(pattern, path)), default)


def pattern_values(pattern: Mapping[str, Any], path: str) -> list[Any]:
    """Return the values of all keys that match a module, in the order of the pattern."""
    compiled = ((compile_key(key), value) for key, value in pattern.items())
    return [value for key, value in compiled if key is not None and key.matches(path)]


def foreign_pattern(config: Mapping[str, Any], name: str, *, file: Path) -> dict[str, Any]:
    """Return rank_pattern or alpha_pattern of another tool's adapter. Raises InputError (GS-3102) for unusable keys."""
    pattern = config.get(name) or {}
    unusable = [key for key in pattern if not is_safe_pattern(key)] if isinstance(pattern, dict) else [pattern]
    if unusable:
        raise InputError(
            f"{name} is no mapping of simple regular expressions", code="GS-3102", file=file, actual=unusable[0],
            hint="name the modules by their paths; ., \\d, [0-3], (a|b) and up to three of *, + and ? are read",
        )  # fmt: skip
    return dict(pattern)


def foreign_scales(config: Mapping[str, Any], ranks: Mapping[str, int], *, file: Path) -> dict[str, float]:
    """Return the scale of each module of another tool's LoRA adapter, given the ranks of its tensors.

    alpha / r, or alpha / √r with use_rslora, per module. The configured rank must be the tensor's: PEFT computes with
    the one and multiplies the other. PEFT sorts the keys of a pattern when it saves, so that the first match may be
    another than in training. Raises InputError: GS-3103 where no rank is the tensor's, GS-3118 where two alphas match,
    GS-355 where alpha is no number.
    """
    of_rank, of_alpha = (foreign_pattern(config, name, file=file) for name in ("rank_pattern", "alpha_pattern"))
    if ranks and not config:
        raise InputError(
            "the scale of the adapter is not known without its configuration", code="GS-3126", file=file,
            hint="take adapter_config.json from the folder of the run; it says lora_alpha",
        )  # fmt: skip
    scales = {}
    for path, rank in ranks.items():
        declared = pattern_value(of_rank, path, config.get("r", rank))
        if rank not in (pattern_values(of_rank, path) or [declared]):
            raise InputError(
                "the configured rank is not the tensor's: the scale is not known", code="GS-3103", file=file,
                tensor=path, expected=f"r {declared}", actual=f"A has {rank} rows",
                hint="correct r or rank_pattern in adapter_config.json, with lora_alpha as it was in training",
            )  # fmt: skip
        alphas = pattern_values(of_alpha, path) or [config.get("lora_alpha", 8)]
        if any(alpha != alphas[0] for alpha in alphas):
            raise InputError(
                "two keys of alpha_pattern give this module different values, and PEFT saves no order of keys",
                code="GS-3118", file=file, tensor=path, actual=", ".join(str(alpha) for alpha in alphas)[:80],
                hint="leave in adapter_config.json the key that training used for this module",
            )  # fmt: skip
        scales[path] = scale_of(alphas[0], rank, config, path, file)
    return scales


def scale_of(alpha: object, rank: int, config: Mapping[str, Any], path: str, file: Path) -> float:
    """Return alpha / rank, or alpha / √rank where the configuration says use_rslora."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise InputError(
            "alpha is not a finite number", code="GS-355", file=file, tensor=path, actual=str(alpha)[:60],
            hint="write lora_alpha as it was in training",
        )  # fmt: skip
    if rank < 1:
        raise InputError(
            "a module of rank 0 has no scale", code="GS-354", file=file, tensor=path, expected="a rank of at least 1",
            actual=rank, hint="save the adapter again, without the module",
        )  # fmt: skip
    return alpha / (math.sqrt(rank) if flag(config, "use_rslora", file=file) else rank)


def flag(config: Mapping[str, Any], name: str, *, file: Path) -> bool:
    """Return a switch of a configuration, false where it is missing or null.

    Raises InputError (GS-356) for anything but true and false: the text "false" is no no.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(
            f"{name} is neither true nor false", code="GS-356", file=file, tensor=name, expected="true or false",
            actual=str(value)[:60], hint=f"write {name} as it was in training, without quotes",
        )  # fmt: skip
    return bool(value)


def saved_modules(config: Mapping[str, Any], *, file: Path) -> list[str]:
    """Return the paths of modules_to_save. Raises InputError where they are no list of names."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise InputError(
            "modules_to_save is no list of names", code="GS-356", file=file, actual=saved,
            hint="take adapter_config.json from the folder of the run",
        )  # fmt: skip
    return saved


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    expected: dict[str, tuple[object, ...]] = {
        "peft_type": ("LORA",),
        "init_lora_weights": (True, None),
        "bias": ("none", None),
        "use_dora": (False, None),
        "use_rslora": (False, True, None),
    }
    for key, allowed in expected.items():
        if config.get(key) not in allowed:
            raise InputError(
                "not a plain LoRA adapter", code="GS-356", file=file, tensor=key, expected=allowed[0],
                actual=config.get(key),
                hint="gora-serve convert ADAPTER --base BASE --output DIR reads adapters of any tool",
            )  # fmt: skip
