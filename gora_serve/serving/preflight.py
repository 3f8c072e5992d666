"""What vLLM would serve wrongly or refuse late, found in an adapter's folder before an engine starts.

`check_adapter` returns every fault of one adapter and `refuse` raises them together, so one run shows all
there is to mend. Only headers and configurations are read: no tensor values, and nothing of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from gora_serve.adapter.peft_config import LARGEST, is_safe_pattern, pattern_value
from gora_serve.errors import InputError
from gora_serve.serving.adapter_dir import AdapterDir, FactorPair

LARGEST_RANK = 512  # vLLM 0.32, config/lora.py, MaxLoRARanks
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Initialisations that leave the base as it is (vLLM's own list, less lora_ga, whose adapter is wrong on the
# real base).
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# PEFT features that change what the adapter means and that no plain LoRA kernel computes.
UNSERVED = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "alora_invocation_tokens", "use_bdlora",
    "use_qalora", "trainable_token_indices", "target_parameters", "arrow_config", "monteclora_config", "kasa_config",
    "megatron_config",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One reason not to serve an adapter: where it is (file and key or tensor), and what is expected there."""

    code: str
    what: str
    file: Path
    key: str | None = None
    expected: object = None
    actual: object = None
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else str(self.file)
        values = [f"{n} {v}" for n, v in (("expected", self.expected), ("got", self.actual)) if v is not None]
        return f"[{self.code}] {place}: {self.what}" + (f" ({', '.join(values)})" if values else "")


def check_adapter(adapter: AdapterDir) -> tuple[Fault, ...]:
    """Return every fault of the adapter, configuration first, then tensors in the order of their names."""
    return (*_config_faults(adapter), *_tensor_faults(adapter))


def refuse(faults: Sequence[Fault]) -> None:
    """Raise InputError when there are faults: one error that names all of them."""
    if not faults:
        return
    first = faults[0]
    hint = first.hint or "gora-serve convert writes plain LoRA on the untouched base, where there is one"
    if len(faults) == 1:
        raise InputError(
            f"{first.key}: {first.what}" if first.key else first.what,
            code=first.code, file=first.file, expected=first.expected, actual=first.actual, hint=hint,
        )  # fmt: skip
    listed = "; ".join(str(fault) for fault in faults)
    raise InputError(f"{len(faults)} faults in the adapters: {listed}", code=first.code, hint=hint)


def config_rank(config: Mapping[str, object], module: str) -> object:
    """Return the rank that PEFT reads from the configuration for `module`."""
    pattern = config.get("rank_pattern")
    return pattern_value(pattern if isinstance(pattern, dict) else {}, module, config.get("r"))


def _config_faults(adapter: AdapterDir) -> Iterator[Fault]:
    config, file = adapter.config, adapter.config_file
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        yield Fault("GS-382", "not a LoRA adapter", file, "peft_type", "LORA", config.get("peft_type"))
    for key in UNSERVED:
        if config.get(key):
            yield Fault("GS-382", "a feature that vLLM cannot serve", file, key, "not set", config[key])
    if config.get("bias", "none") != "none":
        yield Fault("GS-382", "an adapter with biases cannot be served", file, "bias", "none", config["bias"])
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        what = "this initialisation edits the base weights, or vLLM does not know it: the adapter is not plain LoRA"
        yield Fault("GS-383", what, file, "init_lora_weights", True, init)
    yield from _number_faults(config, file)


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
    for name in adapter.others:
        yield Fault("GS-385", "a tensor that is no LoRA factor: an engine drops it or refuses the file", file, name)
    if not adapter.pairs:
        yield Fault("GS-385", "the file has no LoRA factors", file)
    patterns = adapter.config.get("rank_pattern") or {}
    readable = isinstance(patterns, dict) and all(is_safe_pattern(key) for key in patterns)
    for module, pair in sorted(adapter.pairs.items()):
        yield from _pair_faults(adapter, module, pair, readable)


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
    if a[0] > LARGEST_RANK:
        yield Fault("GS-387", "the rank is above what vLLM serves", file, module, f"<= {LARGEST_RANK}", a[0])
    if ranks_readable and config_rank(adapter.config, module) != a[0]:
        what = "the configuration's rank is not the tensors': the adapter would be scaled wrongly"
        yield Fault("GS-388", what, file, module, config_rank(adapter.config, module), a[0])
