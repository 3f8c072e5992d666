"""LoRA of mlx-lm: adapters.safetensors with lora_a (in, r) and lora_b (r, out), and a scale that is no alpha / r.

Both factors are transposes of PEFT's. In a square layer either orientation fits, so shapes prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from converters.foreign import Part, module_path, pair_up, refuse_magnitudes, tensors_of
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.peft_config import LARGEST
from gora_serve.errors import InputError

PART = re.compile(r"\.lora_([ab])$")


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoRA of mlx-lm: delta = scale * lora_bᵀ lora_aᵀ; of embeddings scale * lora_a lora_b, (V, d).

    Embeddings that are the head too are adapted in both places, as mlx-lm does it. Raises InputError (GS-3172 for DoRA,
    GS-3178 for full fine-tunes, GS-3179 for experts, GS-3180 and GS-3181 for a scale that is not known).
    """
    base = inputs.need_base("LoRA of mlx-lm")
    _refuse_full(source)
    refuse_magnitudes(source, ".m", "mlx-lm")
    scale = read_scale(source)

    def parse(name: str) -> Part | None:
        found = PART.search(name)
        return (module_path(base, name[: found.start()]), found.group(1).upper()) if found else None

    _refuse_experts(source)
    pairs = pair_up(source, parse, by_columns=True)
    embeddings = frozenset(path for path in pairs if base.is_embedding(path))
    tied = [path for path in embeddings if base.is_read_by_head(path)]
    heads = {base.head: tied[0]} if tied else {}

    def factors(path: str) -> LoraFactors:
        path = heads.get(path, path)
        a, b = source.tensors[pairs[path].A], source.tensors[pairs[path].B]  # (in, r) and (r, out)
        return LoraFactors(b, a, scale) if path in embeddings else LoraFactors(a.T, b.T, scale)

    name = BaseId(str(source.config.get("model") or ""))
    adapter = Adapter(LazyModules([*pairs, *heads], factors), name, embeddings=embeddings)
    notes = tuple(f"{path} is the head too: the update is written for both" for path in heads.values())
    return Reading(adapter, tensors_of(pairs.values()), method="scale * lora_bᵀ lora_aᵀ", notes=notes)


def read_scale(source: Source) -> float:
    """Return lora_parameters' scale. Raises InputError: GS-3180 where there is none, GS-3181 where it has two meanings.

    Until June 2024 mlx-lm multiplied it by alpha / rank; since then it is the whole scale, and alpha is ignored.
    """
    parameters = source.config.get("lora_parameters")
    given = parameters if isinstance(parameters, Mapping) else {}
    scale, alpha = given.get("scale"), given.get("alpha")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= LARGEST:
        raise InputError(
            "the scale of an mlx-lm adapter is not known", code="GS-3180", file=source.config_file,
            expected="lora_parameters with a number for scale", actual=parameters,
            hint="copy the adapter_config.json that mlx-lm wrote beside adapters.safetensors",
        )  # fmt: skip
    if alpha is not None and alpha != given.get("rank"):
        raise InputError(
            "alpha in lora_parameters: the scale has two meanings", code="GS-3181", file=source.config_file,
            expected="scale alone", actual=dict(given),
            hint="take out alpha; if mlx-lm was older than June 2024, write scale * alpha / rank as the scale",
        )  # fmt: skip
    return float(scale)


def _refuse_full(source: Source) -> None:
    if source.config.get("fine_tune_type") == "full":
        raise InputError(
            "a full fine-tune of mlx-lm: adapters.safetensors holds whole weights", code="GS-3178",
            file=source.weights, expected="fine_tune_type lora",
            hint="mlx_lm.fuse makes a model of it: convert that with --from full and --rank",
        )  # fmt: skip


def _refuse_experts(source: Source) -> None:
    for name in source.tensors:
        if PART.search(name) and len(source.tensors.shape(name)) == 3:
            raise InputError(
                "LoRA of a mixture's experts by mlx-lm is not read", code="GS-3179", file=source.weights, tensor=name,
                expected="(in, r)", actual=source.tensors.shape(name),
                hint="mlx_lm.fuse makes a model of it: convert that with --from full and --rank",
            )  # fmt: skip
