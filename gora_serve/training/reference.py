"""What PEFT answers for an adapter over its base: the oracle of fingerprints and of `serve --verify`."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gora_serve.config import ExportConfig, ModelConfig
from gora_serve.errors import GoraError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.fingerprint import Expected, fingerprint_json
from gora_serve.integrity.headers import read_header
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.manifest import Roots, hash_model
from gora_serve.training.advice import free_memory
from gora_serve.training.lengths import positions
from gora_serve.training.models import load_model, load_settings

TEXTS = (
    "Write one short sentence about the sea.",
    "Question: which day comes after Monday?\nAnswer:",
    "Translate to French: good morning, my friend.",
    "Send the report to Anna, and remind me of it",
    "def add(a, b):\n    return",
    "Water boils at one hundred degrees Celsius, and it freezes at",
    "I would like to change the address of my account because",
    "The three primary colors are",
)
STORED = 3  # texts of a fingerprint
TOP = 5  # tokens of each
LARGEST = 32  # tokens of a prompt
AUTOMATIC = 1 << 30  # parameters: a larger base is not loaded for a fingerprint that nobody asked for


class Reference:
    """A base with adapters, as PEFT loads them, on the CPU. `dtype` is that of the computation."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: torch.dtype = torch.float64) -> None:
        from peft import PeftModel

        model: Any = load_model(Base(str(base), base), ModelConfig(dtype="float32"))
        self._keys = {name: f"a{number}" for number, name in enumerate(adapters)}  # PEFT's become names of modules
        wrapped: Any = None
        for name, folder in adapters.items():
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, folder, adapter_name=self._keys[name])
            else:
                wrapped.load_adapter(folder, adapter_name=self._keys[name])
        self._bare = wrapped is None
        self._model: Any = (model if wrapped is None else wrapped).to(dtype).eval()

    @torch.no_grad()
    def logprobs(self, name: str | None, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Return the log probabilities at the last positions, (last, vocabulary); name None is the base alone."""
        if name is not None:
            self._model.set_adapter(self._keys[name])
        bare = name is None and not self._bare
        with self._model.disable_adapter() if bare else contextlib.nullcontext():
            logits: Tensor = self._model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -last:]
        return logits.double().log_softmax(-1)


def prompts(base: Path, count: int = len(TEXTS), *, after: int = 1) -> list[tuple[int, ...]]:
    """Return the first of TEXTS as the base's own tokens, of which it knows every one.

    They are cut to leave room for `after` tokens among the base's positions.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    settings = load_settings(Base(str(base), base))
    size = getattr(settings.get_text_config(), "vocab_size", None) or math.inf
    longest = min(LARGEST, (positions(settings.to_dict()) or math.inf) - after)
    return [
        tuple(token for place, token in enumerate(tokenizer(text)["input_ids"]) if place < longest and token < size)
        for text in TEXTS[:count]
    ]


def expected_answers(base: Path, adapter: Path) -> list[Expected]:
    """Return the likeliest next tokens after the first texts, with the adapter and without, in float64."""
    reference = Reference(base, {"adapter": adapter})
    found = []
    for tokens in prompts(base, STORED):
        ours, theirs = (reference.logprobs(name, tokens)[0] for name in ("adapter", None))
        top = ours.topk(min(TOP, len(ours))).indices.tolist()
        answers = ({token: float(row[token]) for token in top} for row in (ours, theirs))
        found.append(Expected(tokens, *answers))
    return found


def fingerprint(
    folder: Path, base: Path | None, roots: Roots | None, config: ExportConfig
) -> tuple[dict[str, object] | None, str]:
    """Return the fingerprint of a written adapter, or None, and why.

    It is computed where the base is a folder here, still the one that the adapter is bound to, and where its weights in
    float64 fit into half of the free memory; a base of more than 2^30 parameters only with `canary` "always". Nothing
    that goes wrong here stops an export: an adapter without a fingerprint is served with a weaker check.
    """
    if config.canary == "none":
        return None, "not asked for"
    try:
        if base is None or not (base / "config.json").is_file():
            return None, "its base is no folder on this machine"
        if load_settings(Base(str(base), base)).is_encoder_decoder:
            return None, "vLLM serves no adapters of encoder-decoders"
        if reason := _too_large(base, config):
            return None, reason
        if roots is None or hash_model(base).roots.weights != roots.weights:
            return None, f"{base} is not the base that it is bound to"
        with warnings.catch_warnings():  # what PEFT says of training an adapter is beside the point here
            warnings.simplefilter("ignore")
            return fingerprint_json(expected_answers(base, folder)), "computed with PEFT in float64"
    except Exception as err:  # of PEFT, transformers, tokenizers, torch: any; the adapter is good without it
        reason = err.what if isinstance(err, GoraError) else f"{type(err).__name__}: {err}"
        return None, f"PEFT or transformers cannot answer with it: {reason.splitlines()[0][:120]}"


def _too_large(base: Path, config: ExportConfig) -> str | None:
    entries = [entry for file in find_model(base).weights.values() for entry in read_header(file).entries.values()]
    parameters = sum(math.prod(entry.shape) for entry in entries)
    if config.canary == "auto" and parameters > AUTOMATIC:
        return "its base is large; --canary always loads it"
    if 16 * parameters > free_memory("cpu")[1]:
        return "its base in float64 does not fit into half of the free memory"
    return None
