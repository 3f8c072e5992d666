"""What an adapter's files say of its family: names of tensors, adapter_config.json, and what tools leave beside it.

No tensor is read. Names of tensors come before the configuration: a tool may leave a wrong word in a configuration,
but a name is what its loader looks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.source import CONFIG, Source, is_model
from gora_serve.adapter.peft_config import flag
from gora_serve.errors import InputError, counted

# Family -> what is in the name of one of its tensors, the surest mark first. PEFT may leave `.default` or `.weight`.
_MARKS: Mapping[str, re.Pattern[str]] = {
    family: re.compile(pattern)
    for family, pattern in {
        "kohya": r"^(lora_unet|lora_te\d?|lycoris)_|\.lora_(down|up)\.|\.dora_scale$",
        "dora": r"\.lora_magnitude_vector(\.|$)",
        "adalora": r"\.lora_E(\.|$)",
        "kasa": r"\.lora_diag(\.|$)",
        "loha": r"\.hada_[wt]\d",
        "lokr": r"\.lokr_[wt]\d",
        "vera": r"\.vera_lambda_[bd](\.|$)",
        "miss": r"\.(miss|bone)_block(\.|$)",
        "hra": r"\.hra_u(\.|$)",
        "gora": r"\.weight_[ab]$",
        "torchtune": r"\.lora_[ab]\.weight$",
        "mlx": r"\.lora_[ab]$",
        "lora": r"\.lora_(embedding_)?[AB](\.|$)|\.trainable_tokens_delta(\.|$)",
    }.items()
}
# Family of the tensors -> the peft_types that go with them; a family that is not here has a configuration of its own.
_TYPES: Mapping[str, tuple[str, ...]] = {
    "lora": ("LORA", "LORAGA", "TRAINABLE_TOKENS"),
    "dora": ("LORA",),
    "kasa": ("LORA",),
    "adalora": ("ADALORA",),
    "loha": ("LOHA",),
    "lokr": ("LOKR",),
    "vera": ("VERA",),
    "miss": ("MISS", "BONE"),
    "hra": ("HRA",),
}
_INITS = {"pissa": "pissa", "olora": "olora", "corda": "corda", "loftq": "loftq", "lora_ga": "lora_ga"}
_PLAIN_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Variants of LoRA whose update is not scale * B A, for every input and every token.
_FLAGS = {
    "use_qalora": "QALoRA's A reads groups of inputs, not inputs",
    "use_bdlora": "BD-LoRA keeps blocks of its factors",
    "alora_invocation_tokens": "activated LoRA acts on the tokens after its invocation alone",
    "arrow_config": "Arrow routes each token to another adapter",
    "layer_replication": "the adapter belongs to a model with repeated layers",
}
BACKUP = "pissa_backup"  # of LLaMA-Factory: the trained adapter, before it was converted
LOFTQ_INIT = "loftq_init"
_SIBLINGS = ("pissa_init", LOFTQ_INIT, "init_lora_checkpoint", BACKUP)


@dataclass(frozen=True)
class Found:
    """A family, and the line that says by what it was found."""

    family: str
    evidence: str


def by_tensors(names: Iterable[str]) -> Found | None:
    """Return the family that the names of the tensors belong to, or None where no name is an adapter's."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for name in names:
        family = next((family for family, mark in _MARKS.items() if mark.search(name)), None)
        if family is not None:
            counts[family] = counts.get(family, 0) + 1
            first.setdefault(family, name)
    family = next((family for family in _MARKS if family in counts), None)
    if family is None:
        return None
    named = counted(counts[family], "tensor is named as one", "tensors are named as those")
    return Found(family, f"{named} of {family}, such as {first[family]}")


def by_files(source: Source) -> Found:
    """Return the family by tensors, or by what the folder is. Raises InputError (GS-3200) where nothing fits."""
    found = by_tensors(source.tensors)
    if found is not None:
        return found
    if "fine_tune_type" in source.config:
        return Found("mlx", f"{CONFIG} has fine_tune_type, as mlx-lm writes it")
    if is_model(source.folder) and (source.folder / "config.json").is_file():
        return Found("full", f"{source.folder.name} is a whole model, and none of its tensors is an adapter's")
    names = list(source.tensors)
    raise InputError(
        "no family is known by these tensors", code="GS-3200", file=source.weights,
        tensor=names[0] if names else None,
        actual=f"{counted(len(names), 'tensor')}, peft_type {source.config.get('peft_type')}",
        hint="if you know the family, name it by --from; else report the names of the tensors",
    )  # fmt: skip


def check_configuration(source: Source, family: str) -> str:
    """Return what the configuration says of the family, in a line; "" where it says nothing.

    Raises InputError: GS-3203 where it contradicts the tensors, GS-3205 for a variant whose update is no fixed matrix.
    """
    config = source.config
    kind = config.get("peft_type")
    if kind is None or family not in _TYPES:
        return ""
    if kind not in _TYPES[family]:
        raise _contradiction(source, f"peft_type {' or '.join(_TYPES[family])}", f"peft_type {kind}")
    for key in ("use_dora", "use_qalora"):
        flag(config, key, file=source.config_file)
    for key, variant in (("use_dora", "dora"), ("kasa_config", "kasa")):
        if bool(config.get(key)) != (family == variant) and kind == "LORA" and family in ("lora", "dora", "kasa"):
            said = f"{key} {'set' if config.get(key) else 'not set'}"
            raise _contradiction(source, f"{key} only where the tensors are {variant}'s; they are {family}'s", said)
    for key, why in _FLAGS.items():
        if config.get(key):
            raise InputError(
                f"this LoRA variant cannot be written as plain LoRA: {why}", code="GS-3205", file=source.config_file,
                actual=f"{key} {str(config[key])[:60]}", hint="serve it with PEFT",
            )  # fmt: skip
    return f"{CONFIG}: peft_type {kind}"


def _contradiction(source: Source, expected: str, actual: str) -> InputError:
    return InputError(
        "configuration and tensors contradict each other", code="GS-3203", file=source.config_file, expected=expected,
        actual=actual, hint="put the two files of one run together, or name the family by --from",
    )  # fmt: skip


def by_initialization(config: Mapping[str, Any], file: Path) -> Found:
    """Return the family that init_lora_weights names; lora for words that leave the base alone.

    PEFT compares some words whatever their case. Raises InputError (GS-3204) for a word that is not known.
    """
    word = str(config.get("init_lora_weights", True)).lower()
    evidence = f"{CONFIG}: init_lora_weights {word}"
    if word in _PLAIN_INITS:
        return Found("lora", evidence)
    family = _INITS.get("pissa" if re.fullmatch(r"pissa_niter_\d+", word) else word)
    if family is None:
        raise InputError(
            "init_lora_weights is a word that is not known: it may have edited the base", code="GS-3204", file=file,
            expected=", ".join([*_PLAIN_INITS[:2], *_PLAIN_INITS[3:], *_INITS, "pissa_niter_N"]), actual=word[:60],
            hint="--from lora if the initialisation leaves the base alone, --from residual if it does not",
        )  # fmt: skip
    return Found(family, evidence)


def is_redrawn(config: Mapping[str, Any]) -> bool:
    """Tell whether what the initialisation took out of the base can be had from files of its run alone."""
    word = str(config.get("init_lora_weights")).lower()
    return word.startswith("pissa_niter") or word in ("lora_ga", "corda", "loftq")


def siblings(source: Source, *others: Path | None) -> list[Path]:
    """Return the folders that tools leave: inside the adapter, beside it, or in the base that it was made on."""
    places = [source.folder, source.folder.resolve().parent, *(other for other in others if other is not None)]
    found = [place / name for place in places for name in _SIBLINGS]
    here = source.folder.resolve()
    return [folder for folder in found if _is_folder(folder) and folder.resolve() != here]


def _is_folder(folder: Path) -> bool:
    """Tell whether there is such a folder, also where the one that it would be in is no folder, or may not be searched.

    What a configuration names can be too long for a path.
    """
    try:
        return folder.is_dir()
    except OSError:
        return False
