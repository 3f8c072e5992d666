"""GoRA as its authors' own code saves it (hhnqqq/MyTransformers): weight_a (r, in) and weight_b (out, r) per module.

The scale is not in the checkpoint: config.json beside it says by which of four rules it follows. Names are those of
transformers or of that project's own Llama, whose queries and keys lie in another order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converters.foreign import Part, module_path, pair_up, tensors_of
from converters.initial import Rules, find_initial
from converters.llama import halve_rows, to_halves, translate
from converters.pairs import Pair
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.linalg import subtract
from gora_serve.adapter.peft_config import flag
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import InputError
from gora_serve.integrity.canonical import read_json

PART = re.compile(r"\.weight_([ab])$")
LLAMA = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
UNTOUCHED = ("compress", "vanilla")  # what gora_init_method does to the base's weights: nothing,
MUTATING = ("weight_svd", "grad_svd")  # or W - scale * b a


@dataclass(frozen=True)
class Settings:
    """Of the run's config.json: the numerator of the scale, the mean rank, which rank divides it, and how b began."""

    scaler: float
    mean_rank: float
    by_own_rank: bool
    square_root: bool
    init_method: str

    def scale(self, rank: int) -> float:
        """Return the module's scale: lora_scaler / r or lora_scaler / √r, where r is its own rank or lora_rank.

        Upstream's default divides by lora_rank, so that the scale is the same for all modules (`_get_scaling`).
        """
        divisor = rank if self.by_own_rank else self.mean_rank
        return self.scaler / (math.sqrt(divisor) if self.square_root else divisor)


def read(source: Source, inputs: Inputs) -> Reading:
    """Read GoRA of MyTransformers. Raises InputError (GS-3173 to GS-3176) and UsageError (GS-232) for what it lacks."""
    base = inputs.need_base("GoRA of MyTransformers")
    settings = read_settings(source.folder)
    factors, pairs = _factors(source, settings, base)
    adapter = Adapter(factors, BaseId(""))
    known = _copies(source, base)
    reading = Reading(
        adapter, tensors_of(pairs.values()), known=known, served=None, method="lora_scaler / rank * weight_b weight_a",
        files=(source.folder / "config.json",),
    )  # fmt: skip
    if settings.init_method in UNTOUCHED:
        return reading
    rules = Rules("gora", stored=lambda origin, _: _factors(origin, settings, base)[0])
    initial = find_initial(source, inputs, reading, rules, list(factors))
    modules = LazyModules(factors, lambda path: subtract(factors[path], initial.modules[path]))
    return replace(
        reading,
        adapter=replace(adapter, modules=modules),
        initial=initial.modules,
        edited=initial.edited,
        files=(*reading.files, *initial.files),
        method=f"{initial.method}; gora_init_method {settings.init_method} edited the base",
        notes=initial.notes,
    )


def read_settings(folder: Path) -> Settings:
    """Return what config.json says. Raises InputError where it is missing (GS-3173) or is no run of GoRA (GS-3174)."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            "the scale of a GoRA checkpoint is not known without the run's config.json", code="GS-3173", file=file,
            hint="put config.json of the run's folder beside the checkpoint; MyTransformers writes it at step 1",
        )  # fmt: skip
    config = read_json(file)
    known = config if isinstance(config, dict) else {}
    numbers = {name: _number(known.get(name), least) for name, least in (("lora_scaler", 0.0), ("lora_rank", 1.0))}
    method = known.get("gora_init_method")
    faults = [name for name, value in numbers.items() if value is None]
    faults += [] if known.get("use_gora") is True else ["use_gora"]
    faults += [] if method in (*UNTOUCHED, *MUTATING) else ["gora_init_method"]
    if faults:
        raise InputError(
            "this is not the config.json of a GoRA run", code="GS-3174", file=file, tensor=faults[0],
            expected="use_gora true, numbers for lora_scaler and lora_rank, a known gora_init_method",
            actual=known.get(faults[0]), hint="other methods of MyTransformers scale in other ways",
        )  # fmt: skip
    by_own_rank, square_root = (flag(known, name, file=file) for name in ("gora_dynamic_scaling", "gora_rank_stablize"))
    return Settings(numbers["lora_scaler"], numbers["lora_rank"], by_own_rank, square_root, str(method))  # type: ignore[arg-type]


def _number(value: object, least: float) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9 and value >= least
    return float(value) if fits else None  # type: ignore[arg-type]


def _factors(source: Source, settings: Settings, base: BaseWeights) -> tuple[LazyModules, dict[str, Pair]]:
    """Return the factors by the base's paths, and the names of their tensors."""
    swapped: set[str] = set()  # modules under the names of MyTransformers' own Llama

    def parse(name: str) -> Part | None:
        found = PART.search(name)
        if found is None:
            return None
        path, own = hf_path(name[: found.start()], base)
        swapped.update([path] if own else [])
        return path, found.group(1).upper()

    pairs = pair_up(source, parse)
    ranks = {path: source.tensors.shape(pair.A)[0] for path, pair in pairs.items()}
    _check_ranks(source.folder / "rank.json", ranks, base)

    def factors(path: str) -> LoraFactors:
        factors = LoraFactors(source.tensors[pairs[path].A], source.tensors[pairs[path].B], settings.scale(ranks[path]))
        return to_halves(factors, path, base) if path in swapped else factors

    return LazyModules(pairs, factors), pairs


def hf_path(path: str, base: BaseWeights) -> tuple[str, bool]:
    """Return transformers' path of a module, and whether `path` was one of MyTransformers' own Llama."""
    own = translate(path, LLAMA)
    return (own, True) if own is not None else (module_path(base, path), False)


def _check_ranks(file: Path, ranks: Mapping[str, int], base: BaseWeights) -> None:
    """Check the tensors' ranks against rank.json, if it is there: 0 has no tensors, and floats are whole (a // b).

    Raises InputError (GS-3175) for a module whose rank is another, or whose tensors are missing.
    """
    declared = read_json(file) if file.is_file() else {}
    if not isinstance(declared, dict):
        raise InputError("rank.json is not an object", code="GS-3176", file=file, hint="fetch it again")
    for name, rank in declared.items():
        path, _ = hf_path(name, base)
        if rank != ranks.get(path, 0):
            raise InputError(
                "rank.json and the checkpoint differ", code="GS-3175", file=file, tensor=name, expected=f"rank {rank}",
                actual=f"rank {ranks[path]}" if path in ranks else "no tensors",
                hint="take both from one run; a checkpoint of another task or step may lie in the folder",
            )  # fmt: skip


def _copies(source: Source, base: BaseWeights) -> dict[str, str]:
    """Return the base's own weights, which lie in the checkpoint too unless the run had --save-trainable.

    A weight that is not the base's is left out, and `convert` refuses it: it was trained whole, or edited.
    """
    copies = {}
    for name in source.tensors:
        path, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            continue
        hf, own = hf_path(path, base)
        theirs = base.find(hf) if kind == "weight" else base.find_parameter(name)
        if theirs is None or base.tensors.shape(theirs) != source.tensors.shape(name):
            continue
        weight = source.tensors[name]
        if own and weight.ndim == 2:
            weight = halve_rows(weight, hf, base)
        if torch.equal(weight, base.tensors[theirs].to(weight.dtype)):
            copies[name] = "a copy of the base's own weight"
    return copies
