"""What config.json says of a merged model: ties, vocabulary, type, labels of a classifier. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gora_serve.deploy.base import EMBEDDINGS, HEADS, BaseWeights
from gora_serve.deploy.merge_values import Part, Target
from gora_serve.errors import BindingError

_LABELS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of a classifier: a row for each label
_OTHER_HEAD = re.compile("(ForCausalLM|(With)?LMHeadModel|ForMaskedLM|ForPreTraining|(?<!Encoder)Model)$")


def _vocabularies(targets: Sequence[Target]) -> Iterator[Target]:
    for target in targets:
        if target.name.endswith(".weight") and target.name.split(".")[-2] in (*EMBEDDINGS, *HEADS):
            yield target


def check_vocabulary(base: BaseWeights, targets: Sequence[Target]) -> None:
    """Raise BindingError (GS-4401) where embeddings and head end up with other numbers of tokens, unlike the base's."""
    before = {one.source: base.tensors.shape(one.source)[0] for one in _vocabularies(targets) if one.source}
    after = {one.name: one.shape[0] for one in _vocabularies(targets)}
    resized = {one.name for one in _vocabularies(targets) if one.source and one.shape[0] != before[one.source]}
    if resized and len(set(after.values())) > 1:
        raise BindingError(
            "the adapter resizes the vocabulary of one module and not of the other", code="GS-4401",
            file=base.folder, tensor=min(resized), actual=", ".join(f"{name} {rows}" for name, rows in after.items()),
            hint="save the adapter with both, embeddings and head (save_embedding_layers=True)",
        )  # fmt: skip


def new_config(
    base: BaseWeights, parts: Sequence[Part], targets: Sequence[Target], dtype: str, *, untied: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the new config.json, None where it stays as it is, and notes on what changed."""
    config, notes = dict(base.config), []
    if untied:
        config = _everywhere(config, "tie_word_embeddings", False)
        notes.append("the head was tied to the embeddings and gets another update: it has a tensor of its own now")
    rows = next((one.shape[0] for one in _vocabularies(targets) if one.source and one.shape != base.tensors.shape(
        one.source)), None)  # fmt: skip
    if rows is not None:
        config = _everywhere(config, "vocab_size", rows)
        notes.append(f"the vocabulary has {rows} tokens now: embeddings and tokenizer must be of one run")
    if dtype != "auto":
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config = _everywhere(config, key, dtype)
    config = _classifier(config, parts, targets)
    return (config if config != base.config else None), notes


def _everywhere(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key at the top, and in the text model's own part where that is another object and has it."""
    text = config.get("text_config")
    inner = {"text_config": {**text, key: value}} if isinstance(text, dict) and key in text else {}
    return {**config, **inner} if inner and key not in config else {**config, **inner, key: value}


def _classifier(config: dict[str, Any], parts: Sequence[Part], targets: Sequence[Target]) -> dict[str, Any]:
    """Name as many labels as a new classifier has rows, and the model after it."""
    heads = [one for one in targets if one.fresh and one.name.endswith(_LABELS)]
    if not heads or not any(part.task_type == "SEQ_CLS" for part in parts):
        return config
    rows = heads[0].shape[0]
    if len(config.get("id2label") or {}) != rows:
        labels = {str(index): f"LABEL_{index}" for index in range(rows)}
        config = config | {"id2label": labels, "label2id": {name: int(index) for index, name in labels.items()}}
    names = config.get("architectures") or []
    renamed = [_OTHER_HEAD.sub("ForSequenceClassification", name) for name in names]
    return config | ({"architectures": renamed} if names else {})
