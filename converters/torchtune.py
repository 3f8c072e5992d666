"""LoRA of torchtune in its own names (adapter_model.pt, adapter_N.pt): lora_a.weight (r, in), lora_b.weight (out, r).

The adapter_model.safetensors that torchtune writes beside it is PEFT's plain LoRA and needs nothing from here, but for
Qwen: there torchtune permutes the rows of queries and keys although its Qwen rotates halves, as transformers does.
"""

from __future__ import annotations

import re

from converters.foreign import Part, pair_up, refuse_magnitudes, tensors_of
from converters.llama import to_halves, translate
from converters.lora import base_id
from converters.reading import Inputs, Reading
from converters.source import Source
from gora_serve.adapter.factors import Adapter, LazyModules, LoraFactors
from gora_serve.adapter.peft_config import foreign_scales
from gora_serve.errors import InputError

PART = re.compile(r"\.lora_([ab])\.weight$")
NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "output": "lm_head",
}
HALVES = ("qwen2", "qwen3", "phi3")  # model types whose queries and keys torchtune keeps in transformers' order


def read(source: Source, inputs: Inputs) -> Reading:
    """Read LoRA of torchtune: alpha / r B A, with q_proj's and k_proj's rows of B in transformers' order.

    alpha comes from adapter_config.json. Raises InputError: GS-3172 for DoRA, GS-3182 where there is no alpha.
    """
    base = inputs.need_base("LoRA of torchtune")
    refuse_magnitudes(source, ".magnitude", "torchtune")
    pairs = pair_up(source, _parse)
    if source.config.get("lora_alpha") is None:
        raise InputError(
            "the scale of a torchtune adapter is not known", code="GS-3182", file=source.config_file,
            expected="an adapter_config.json with r and lora_alpha",
            hint='write {"r": ..., "lora_alpha": ...} of the recipe into that file',
        )  # fmt: skip
    ranks = {path: source.tensors.shape(pair.A)[0] for path, pair in pairs.items()}
    scales = foreign_scales(source.config, ranks, file=source.config_file)
    permuted = base.config.get("model_type") not in HALVES

    def factors(path: str) -> LoraFactors:
        stored = LoraFactors(source.tensors[pairs[path].A], source.tensors[pairs[path].B], scales[path])
        return to_halves(stored, path, base) if permuted else stored

    adapter = Adapter(LazyModules(pairs, factors), base_id(source))
    return Reading(adapter, tensors_of(pairs.values()), method="alpha / r * B A, RoPE's rows in transformers' order")


def _parse(name: str) -> Part | None:
    found = PART.search(name)
    path = translate(name[: found.start()], NAMES) if found else None
    return (path, found.group(1).upper()) if found and path else None
