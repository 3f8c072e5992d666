"""What an adapter's configuration may ask for that vLLM does not serve as plain LoRA, and the command that helps.

Facts only: which keys and words there are, why each is refused, and which of them `gora-serve convert` reads.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

# Initialisations that leave the base as it is (vLLM's own list, less lora_ga, whose adapter is wrong on the
# real base).
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Those that edit the base -> what `convert` needs beside the base; docs/converters.md has the formulas.
EDITING_INITS: Mapping[str, str] = {
    "pissa": "", "olora": "", "pissa_niter": " --init-adapter DIR", "lora_ga": " --init-adapter DIR",
    "loftq": " --init-adapter DIR", "corda": " --cache FILE",
}  # fmt: skip
EDITED = "the initialisation edited the base, so that on the real base the adapter is wrong"
UNKNOWN_INIT = "an initialisation that is not known: it may have edited the base"

# Features of PEFT that change what an adapter means -> why no plain LoRA kernel computes them.
UNSERVED: Mapping[str, str] = {
    "use_dora": "DoRA rescales each row of the adapted weight: its update is no LoRA",
    "lora_bias": "the factors have biases of their own",
    "modules_to_save": "whole modules come with the adapter, and vLLM takes none but a classifier's head",
    "layer_replication": "the adapter belongs to a model with repeated layers",
    "alora_invocation_tokens": "activated LoRA acts on the tokens after its invocation alone",
    "use_bdlora": "BD-LoRA keeps blocks of its factors",
    "use_qalora": "QALoRA's A reads groups of inputs",
    "trainable_token_indices": "trained embedding rows come with the adapter",
    "target_parameters": "it adapts bare parameters, which vLLM does not wrap",
    "arrow_config": "Arrow routes each token to another adapter",
    "monteclora_config": "the factors are drawn at random",
    "kasa_config": "KaSA has a diagonal between its factors, and edits the base",
    "megatron_config": "the layers are Megatron's",
}
# What `convert` makes plain LoRA of, and the options that it wants; what is not here stays with PEFT.
_CONVERTED_FEATURES: Mapping[str, str] = {
    "use_dora": " --rank R", "trainable_token_indices": "", "target_parameters": "", "kasa_config": "",
}  # fmt: skip
_CONVERTED_TYPES = frozenset({"ADALORA", "LOHA", "LOKR", "VERA", "HRA", "MISS", "BONE", "LORAGA", "TRAINABLE_TOKENS"})
TRAIN_ELSE = "serve it with PEFT, or train it without this"


def convert_command(adapter: Path, base: Path | None, more: str = "") -> str:
    """Return the command that writes the adapter as plain LoRA beside itself."""
    output = adapter.with_name(f"{adapter.name}-plain")
    words = ("gora-serve", "convert", str(adapter), "--base", str(base) if base else "BASE", "--output", str(output))
    return shlex.join(words) + more


def init_way(init: str, adapter: Path, base: Path | None) -> tuple[str, str]:
    """Return why an initialisation is refused, and what to run."""
    word = "pissa_niter" if re.fullmatch(r"pissa_niter_\d+", init.lower()) else init.lower()
    if word not in EDITING_INITS:
        return UNKNOWN_INIT, convert_command(
            adapter, base, " --from lora, if it left the base alone; else --from residual"
        )
    return EDITED, convert_command(adapter, base, EDITING_INITS[word])


def feature_way(feature: str, adapter: Path, base: Path | None) -> str:
    """Return what to do about an adapter with this feature."""
    more = _CONVERTED_FEATURES.get(feature)
    return TRAIN_ELSE if more is None else convert_command(adapter, base, more)


def type_way(peft_type: str, adapter: Path, base: Path | None) -> str:
    """Return what to do about an adapter of this peft_type."""
    return convert_command(adapter, base) if peft_type in _CONVERTED_TYPES else TRAIN_ELSE
