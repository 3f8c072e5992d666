"""What vLLM would serve wrongly or refuse late, found in an adapter's folder before an engine starts.

`check_adapter` returns every fault of one adapter and `refuse` raises them together, so one run shows all
there is to mend. Only headers and configurations are read: no tensor values, and nothing of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from pathlib import Path

from gora_serve.adapter.engine_ranks import LARGEST_RANK
from gora_serve.adapter.peft_config import LARGEST, is_safe_pattern, pattern_value
from gora_serve.errors import GoraError, InputError, listed
from gora_serve.serving.adapter_dir import AdapterDir, FactorPair
from gora_serve.serving.unserved import (
    PLAIN_INITS,
    TRAIN_ELSE,
    UNSERVED,
    convert_command,
    feature_way,
    init_way,
    type_way,
)

LARGEST_LOGITS = 258_048  # vLLM 0.32, lora/layers/logits_processor.py: tokens of a head that LoRA may adapt
LOWER = "gora-serve convert with a lower --rank, or a larger --tolerance"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
MEND = "export or fetch the adapter again; gora-serve convert reads those of other tools"
SHOWN = 4  # modules that one fault names beside the first
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6  # beyond these no training ends; a mistaken alpha or rank does
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.+)")


@dataclass(frozen=True)
class Fault:
    """One reason not to serve an adapter: where it is (file and key or tensor), and what is expected there.

    `error` is the error that it was made of, if it was.
    """

    code: str
    what: str
    file: Path
    key: str | None = None
    expected: object = None
    actual: object = None
    hint: str | None = None
    error: GoraError | None = None

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else str(self.file)
        values = [f"{n} {v}" for n, v in (("expected", self.expected), ("got", self.actual)) if v is not None]
        told = f"[{self.code}] {place}: {self.what}" + (f" ({', '.join(values)})" if values else "")
        return f"{told}; try: {self.hint or MEND}"


def as_fault(err: GoraError, path: Path) -> Fault:
    """Return the error as one of several faults; `path` is where it is, if the error names no file."""
    tensor, hint = err.fields.get("tensor"), err.fields.get("try")
    return Fault(
        err.code, err.what, Path(str(err.fields.get("file", path))), None if tensor is None else str(tensor),
        err.fields.get("expected"), err.fields.get("actual"), str(hint) if hint else None, err,
    )  # fmt: skip


def check_adapter(adapter: AdapterDir, base: Path | None = None) -> tuple[Fault, ...]:
    """Return every fault of the adapter, configuration first, then tensors in the order of their names.

    `base` only names the base in the commands that are advised.
    """
    if str(adapter.config.get("peft_type", "LORA")).upper() != "LORA":  # what it lacks as LoRA is no fault of its own
        return tuple(_config_faults(adapter, base))[:1]
    return (*_config_faults(adapter, base), *_grouped(_tensor_faults(adapter)))


def _grouped(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Yield one fault for all of one kind: it names the first module, and counts the others."""
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.code, fault.what), []).append(fault)
    for first, *others in kinds.values():
        also = listed((str(fault.key) for fault in others), SHOWN)
        yield replace(first, what=f"{first.what}; also {also}") if others else first


def refuse(faults: Sequence[Fault]) -> None:
    """Raise when there are faults: the one there is as it is, or one error that lists all of them.

    Several have the class and the code of the first.
    """
    if not faults:
        return
    first = faults[0]
    if len(faults) == 1:
        raise first.error or InputError(
            f"{first.key}: {first.what}" if first.key else first.what,
            code=first.code, file=first.file, expected=first.expected, actual=first.actual, hint=first.hint or MEND,
        )  # fmt: skip
    kind = type(first.error) if first.error else InputError
    raise kind(
        f"{len(faults)} faults in the adapters", code=first.code, hint="mend all of them; each line says how",
        faults=[str(fault) for fault in faults],
    )  # fmt: skip


def config_rank(config: Mapping[str, object], module: str) -> object:
    """Return the rank that PEFT reads from the configuration for `module`."""
    return _pattern_value(config, "rank_pattern", module, config.get("r"))


def effective_scales(adapter: AdapterDir) -> dict[str, float]:
    """Return the scale that PEFT and vLLM give each module's B A: alpha / r, with rsLoRA alpha / sqrt(r).

    Modules whose numbers cannot be used are left out: these are faults of their own.
    """
    scales = {}
    for module, pair in adapter.pairs.items():
        alpha = _pattern_value(adapter.config, "alpha_pattern", module, adapter.config.get("lora_alpha"))
        if pair.A is not None and pair.A.shape and pair.A.shape[0] and isinstance(alpha, int | float):
            rank = pair.A.shape[0]
            scales[module] = alpha / (sqrt(rank) if adapter.config.get("use_rslora") else rank)
    return scales


def form_of(adapter: AdapterDir) -> str:
    """Return what the configuration looks like: unit or native as `export` has them; uniform where it has no patterns,
    and so one rank for all modules, which may be padded ones or not; else plain.
    """
    if not (adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern")):
        return "uniform"
    if adapter.config.get("use_rslora"):
        return "native"
    one = all(abs(scale - 1) < 1e-9 for scale in effective_scales(adapter).values())
    return "unit" if one else "plain"


def _pattern_value(config: Mapping[str, object], name: str, module: str, default: object) -> object:
    pattern = config.get(name)
    return pattern_value(pattern if isinstance(pattern, dict) else {}, module, default)


def _config_faults(adapter: AdapterDir, base: Path | None) -> Iterator[Fault]:
    config, file, path = adapter.config, adapter.config_file, adapter.path
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        hint = type_way(kind, path, base)
        yield Fault("GS-382", "not a LoRA adapter", file, "peft_type", "LORA", config.get("peft_type"), hint)
    for key, why in UNSERVED.items():
        if config.get(key):
            yield Fault("GS-382", f"vLLM cannot serve it: {why}", file, key, "not set", _short(config[key]),
                        feature_way(key, path, base))  # fmt: skip
    if config.get("bias", "none") != "none":
        what = "trained biases come with the adapter, and vLLM adapts none"
        yield Fault("GS-382", what, file, "bias", "none", config["bias"], TRAIN_ELSE)
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool)) and str(init).lower() not in PLAIN_INITS:
        what, hint = init_way(str(init), path, base)
        yield Fault("GS-383", what, file, "init_lora_weights", True, _short(init), hint)
    for key in ("use_rslora", "fan_in_fan_out"):
        if config.get(key) is not None and not isinstance(config[key], bool):
            what = 'neither true nor false: the text "false" would be read as true'
            yield Fault("GS-3350", what, file, key, "true or false", _short(config[key]))
    yield from _number_faults(config, file)


def _short(value: object) -> str:
    return str(value)[:60]


def _number_faults(config: Mapping[str, object], file: Path) -> Iterator[Fault]:
    """Ranks and alphas must be positive numbers and their patterns valid: PEFT and vLLM compute with them."""
    if not _is_rank(config.get("r")):
        yield Fault("GS-381", "not a rank", file, "r", "a positive integer", config.get("r"))
    if not _is_number(config.get("lora_alpha")):
        yield Fault("GS-381", "not a scale", file, "lora_alpha", "a number above 0", config.get("lora_alpha"))
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            yield Fault("GS-381", "not a mapping", file, name, "module pattern to number", type(pattern).__name__)
            continue
        for key, value in pattern.items():
            if not fits(value):
                yield Fault("GS-381", "not a usable number", file, f"{name}[{key}]", actual=value)
            if not is_safe_pattern(key):
                yield Fault("GS-381", "not a simple regular expression", file, f"{name}[{key}]")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and 0 < value <= LARGEST


def _tensor_faults(adapter: AdapterDir) -> Iterator[Fault]:
    file = adapter.weights_file
    if not adapter.pairs:
        yield Fault("GS-385", "the file has no LoRA factors", file)
        return
    for name in adapter.others:
        yield Fault("GS-385", "a tensor that is no LoRA factor: an engine drops it or refuses the file", file, name)
    readable = _is_readable(adapter.config.get("rank_pattern"))
    for module, pair in sorted(adapter.pairs.items()):
        yield from _pair_faults(adapter, module, pair, readable)
    if readable and _is_readable(adapter.config.get("alpha_pattern")):
        yield from _scale_faults(adapter)
    yield from _expert_faults(adapter)


def _is_readable(pattern: object) -> bool:
    return isinstance(pattern or {}, dict) and all(is_safe_pattern(key) for key in pattern or {})  # type: ignore[attr-defined]


def _scale_faults(adapter: AdapterDir) -> Iterator[Fault]:
    for module, scale in sorted(effective_scales(adapter).items()):
        if scale > 0 and not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            expected = f"{SMALLEST_SCALE:g} to {LARGEST_SCALE:g}"
            what = "the effective scale of this module is absurd: alpha is wrong"
            yield Fault("GS-3351", what, adapter.config_file, module, expected, f"{scale:g}")


def _expert_faults(adapter: AdapterDir) -> Iterator[Fault]:
    """vLLM stacks the experts of a layer: each projection must have one rank in all of them."""
    ranks: dict[str, dict[int, str]] = {}
    for module, pair in sorted(adapter.pairs.items()):
        match = _EXPERT.fullmatch(module)
        if match and pair.A is not None and pair.A.shape:
            ranks.setdefault(f"{match[1]}.*.{match[2]}", {})[pair.A.shape[0]] = module
    for projection, found in ranks.items():
        if len(found) > 1:
            what = "the experts of this projection have different ranks, and vLLM stacks them"
            ranks_found, hint = ", ".join(map(str, sorted(found))), convert_command(adapter.path, None)
            yield Fault("GS-3352", what, adapter.weights_file, projection, "one rank", ranks_found, hint)


def _pair_faults(adapter: AdapterDir, module: str, pair: FactorPair, ranks_readable: bool) -> Iterator[Fault]:
    file = adapter.weights_file
    if pair.A is None or pair.B is None:
        yield Fault("GS-384", f"lora_{'A' if pair.A is None else 'B'} is missing", file, module)
        return
    for entry in (pair.A, pair.B):
        if entry.dtype not in FLOATS:
            yield Fault("GS-386", "not a floating-point tensor", file, entry.name, actual=entry.dtype)
    a, b = tuple(pair.A.shape), tuple(pair.B.shape)  # (r, in), (out, r)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        yield Fault("GS-386", "A and B do not fit together", file, module, "(r, in) and (out, r)", f"{a} and {b}")
        return
    if module.endswith("lm_head") and b[0] > LARGEST_LOGITS:
        what = "vLLM adapts no head of so many tokens"
        yield Fault("GS-3353", what, file, module, f"<= {LARGEST_LOGITS} tokens", b[0], "train it without lm_head")
    if a[0] > LARGEST_RANK:
        yield Fault("GS-387", "the rank is above what vLLM serves", file, module, f"<= {LARGEST_RANK}", a[0], LOWER)
    said = config_rank(adapter.config, module)
    if ranks_readable and _is_rank(said) and said != a[0] <= LARGEST_RANK:
        what = "the configuration's rank is not the tensors': the adapter would be scaled wrongly"
        yield Fault("GS-388", what, file, module, said, a[0])
