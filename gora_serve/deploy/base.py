"""A model's weights as they lie on disk, one at a time: by module path, whatever the checkpoint calls them.

No model class is built. A checkpoint may leave out the model's first name part (`h.0.attn` for `transformer.h.0.attn`),
add one, tie the head to the embeddings, or keep linear weights as (in, out), as GPT-2's Conv1D does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gora_serve.adapter.tensors import TensorFiles
from gora_serve.errors import BindingError, InputError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.layout import find_model

TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
TRANSPOSED_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")  # Conv1D layers in transformers' models of these types
FLOATS = ("F64", "F32", "F16", "BF16")
BARE = ("h", "wte", "layers", "embed_tokens", "blocks", "embeddings", "encoder")  # first parts of such names
MODEL_HEAD, FILE_HEAD = "lm_head", "embed_out"  # GPT-NeoX: the module's name, and the one in its files
HEADS = (MODEL_HEAD, FILE_HEAD)
SHARED, HALVES = "shared", ("encoder.embed_tokens", "decoder.embed_tokens")  # of encoder-decoders, one tensor
EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "embeddings", "tokens_embed",
    "word_embedding", "w",
)  # fmt: skip
HEAD_OF_TYPE = {  # model_type -> the path of the head that may be tied, where it is another than lm_head
    "biogpt": "output_projection", "trocr": "output_projection", "whisper": "proj_out", "moonshine": "proj_out",
    "rwkv": "head", "xlnet": "lm_loss", "xlm": "pred_layer.proj", "flaubert": "pred_layer.proj",
    "gpt_neox_japanese": "embed_out",
}  # fmt: skip
# Tensors that models compute for themselves, and old checkpoints hold.
COMPUTED = re.compile(r"(inv_freq|position_ids|\.masked_bias|\battn\.bias|\battention\.bias)$")
SAVE_AGAIN = "save the base again: AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(DIR)"
HEADLESS = ("Classification", "ForQuestionAnswering", "ForMultipleChoice")  # ends of the names of such architectures


def misfit(file: Path, tensor: str, expected: object, actual: object) -> BindingError:
    """Return the error (GS-405) for a part of an adapter that has another shape than the base's."""
    return BindingError(
        "the adapter does not fit this base", code="GS-405", file=file, tensor=tensor, expected=expected,
        actual=actual, hint="give the base that the adapter was trained on",
    )  # fmt: skip


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise InputError (GS-3402) where a value of config.json that is used here is of another kind than it must be."""
    names = config.get("architectures")
    fits = {
        "architectures": ("a list of names", isinstance(names, list) and all(isinstance(one, str) for one in names)),
        "id2label": ("an object", isinstance(config.get("id2label"), dict)),
        "text_config": ("an object", isinstance(config.get("text_config"), dict)),
        "tie_word_embeddings": ("true or false", isinstance(config.get("tie_word_embeddings"), bool)),
    }
    for key, (expected, right) in fits.items():
        if config.get(key) is not None and not right:
            raise InputError(
                f"{key} in config.json is of another kind than belongs there", code="GS-3402", file=file,
                expected=expected, actual=json.dumps(config[key])[:80], hint="fetch the model again, or correct it",
            )  # fmt: skip


def split_shared(path: str) -> tuple[str, str]:
    """Return ("model.", "encoder.embed_tokens") of model.encoder.embed_tokens, and (path, "") of other modules."""
    half = next((one for one in HALVES if path.endswith(one)), "")
    return (path.removesuffix(half), half) if half else (path, "")


def is_finite(weight: Tensor) -> bool:
    """Tell whether there is no NaN and nothing infinite, in one pass without a mask."""
    return weight.numel() == 0 or all(math.isfinite(float(one)) for one in weight.aminmax())


class BaseWeights:
    """The weights of one model folder. Nothing is read before it is asked for, and nothing is kept."""

    def __init__(self, folder: Path) -> None:
        """Read configuration and headers. Raises InputError: GS-3109, GS-3402 for a configuration that is none, and
        InputError and MachineError as the readers of both do."""
        self.folder = folder
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise InputError(
                "config.json is not an object", code="GS-3109", file=folder / "config.json",
                hint="fetch the model again",
            )  # fmt: skip
        check_config(config, folder / "config.json")
        self.config: Mapping[str, Any] = config
        self.tensors = TensorFiles(find_model(folder).weights.values())

    def find(self, path: str) -> str | None:
        """Return the name of the tensor that is the weight of module `path`, or None where the base has none."""
        return self.find_parameter(f"{path}.weight") or self._other_name(path) or self._tied(path)

    def _other_name(self, path: str) -> str | None:
        """The tensor under the name that files have: GPT-NeoX's head, embeddings that T5's and BART's halves share."""
        stem, half = split_shared(path)
        if half:
            return self.find_parameter(f"{stem}{SHARED}.weight")
        return self.find_parameter(f"{FILE_HEAD}.weight") if path == MODEL_HEAD else None

    def find_parameter(self, name: str) -> str | None:
        """Return the checkpoint's name of a parameter (`<module path>.weight` or `.bias`), or None."""
        for candidate in (name, name.partition(".")[2]) if self.is_bare else (name,):
            if candidate in self.tensors.entries:
                return candidate
        longer = self._by_tail.get(name, [])
        return longer[0] if len(longer) == 1 else None

    def counterpart(self, parameter: str) -> str | None:
        """Return the checkpoint's name of what a parameter stands for; for a head that is tied, its embeddings."""
        module, _, kind = parameter.rpartition(".")
        return self.find(module) if kind == "weight" else self.find_parameter(parameter)

    def own_name(self, parameter: str) -> str:
        """Return what the checkpoint calls a parameter, where only a first part tells the two names apart.

        The name as it is for one that the base lacks, or that is another's tensor: a tied head, shared embeddings.
        """
        found = self.counterpart(parameter) or parameter
        stem, half = split_shared(parameter.removesuffix(".weight"))
        for name in (parameter, f"{stem}{SHARED}.weight") if half else (parameter,):
            if found.endswith(f".{name}"):
                return found.removesuffix(name) + parameter
            if name.endswith(f".{found}"):
                return parameter.removeprefix(name.removesuffix(found))
        return parameter

    def name_in_model(self, parameter: str, adapter: Mapping[str, Any]) -> str:
        """Return what a parameter is called in the model that PEFT loads from this checkpoint, where an adapter that
        was trained on the model without its head calls it by all but the first part of its name.

        adapter: its adapter_config.json. Over another class it is loaded again: such names stay. Raises BindingError
        (GS-453) where the checkpoint lacks that part itself.
        """
        if self._is_for_another_class(adapter):
            return parameter
        if parameter.partition(".")[0] in BARE and self.counterpart(parameter) == parameter:
            self.need_model_names()
        own = self.own_name(parameter)
        return parameter if len(own) < len(parameter) else own

    def _is_for_another_class(self, adapter: Mapping[str, Any]) -> bool:
        """Whether an adapter's class is not the one that config.json names, nor that one without its head."""
        if self.is_trunk or adapter.get("task_type") == "FEATURE_EXTRACTION":
            return True
        mapping = adapter.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        own = self.config.get("architectures") or ()
        return isinstance(name, str) and not name.endswith("Model") and name not in own

    @cached_property
    def is_bare(self) -> bool:
        """Whether the checkpoint's names lack their first part, as those of a model saved without its head do."""
        return any(name.partition(".")[0] in BARE for name in self.tensors)

    def need_model_names(self) -> None:
        """Raise BindingError (GS-453) where the checkpoint's names are not those of the model that PEFT loads."""
        heads = ("LMHeadModel", "ForCausalLM", "ForSequenceClassification", "ForMaskedLM")
        names = self.config.get("architectures") or [""]
        if self.is_bare and str(names[0]).endswith(heads):
            raise BindingError(
                "the base's tensors lack the first part of their names, which an adapter's need", code="GS-453",
                file=self.folder, tensor=next(iter(self.tensors)),
                hint=SAVE_AGAIN,
            )  # fmt: skip

    @cached_property
    def _by_tail(self) -> dict[str, list[str]]:
        """Tensor names by all but their first part."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            found.setdefault(name.partition(".")[2], []).append(name)
        return found

    @cached_property
    def head(self) -> str:
        """The path of the module that makes tokens of states, as models of this type call it."""
        return HEAD_OF_TYPE.get(str(self.config.get("model_type")), MODEL_HEAD)

    @cached_property
    def ties_head(self) -> bool:
        """Whether the model has a head without a tensor of its own, which reads the embeddings'."""
        return self._own_head is None and bool(self.config.get("tie_word_embeddings", True)) and not self._is_headless

    @cached_property
    def copied_to_head(self) -> str | None:
        """The embeddings' tensor that the head's own is a copy of, which some tools store although the two are tied.

        Where the two differ, transformers ties them no more.
        """
        own, embeddings = self._own_head, self._tied(self.head)
        if own is None or embeddings is None or self._is_headless:
            return None
        if self.tensors.shape(own) != self.tensors.shape(embeddings):
            return None
        return embeddings if torch.equal(self.tensors[own], self.tensors[embeddings]) else None

    @property
    def _own_head(self) -> str | None:
        """The head's tensor, where it has one of its own."""
        return self.find_parameter(f"{self.head}.weight") or self._other_name(self.head)

    @property
    def _is_headless(self) -> bool:
        return str((self.config.get("architectures") or [""])[0]).endswith(HEADLESS)

    @property
    def is_trunk(self) -> bool:
        """Whether config.json names a model without any head, as BertModel is."""
        name = (self.config.get("architectures") or [""])[0]
        return name.endswith("Model") and not name.endswith(("LMHeadModel", "DoubleHeadsModel"))

    def _tied(self, path: str) -> str | None:
        """The embeddings' tensor for a head that is tied to them."""
        if not self.is_head(path) or not self.config.get("tie_word_embeddings", True):
            return None
        found = [name for name in self.tensors if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS]
        return found[0] if len(found) == 1 else None

    def feeds_head(self, path: str) -> bool:
        """Return whether the head has no weight of its own but that of the embeddings `path`."""
        return self.ties_head and self._tied(self.head) is not None and self._tied(self.head) == self.find(path)

    def is_read_by_head(self, path: str) -> bool:
        """Return whether the head's weight is that of the embeddings `path`, be it stored as a copy."""
        return self.feeds_head(path) or (self.is_embedding(path) and self.copied_to_head == self.find(path) is not None)

    def is_transposed(self, path: str) -> bool:
        """Return whether the module's weight is stored as (in, out): GPT-2's Conv1D, be it the decoder of a pair."""
        decoder = self.config.get("decoder")
        part = decoder if isinstance(decoder, dict) and path.startswith("decoder.") else self.config
        return part.get("model_type") in TRANSPOSED_TYPES and path.rpartition(".")[2] in TRANSPOSED_NAMES

    def is_head(self, path: str) -> bool:
        return path == self.head or path.rpartition(".")[2] in HEADS

    def is_embedding(self, path: str) -> bool:
        return path.rpartition(".")[2] in EMBEDDINGS

    def shape(self, path: str) -> tuple[int, int]:
        """Return (out, in) of a module. Raises BindingError (GS-404) where the base has none, or no matrix, there."""
        shape = self.tensors.shape(self._name(path))
        return (shape[1], shape[0]) if self.is_transposed(path) else (shape[0], shape[1])

    def dtype(self, path: str) -> str:
        """Return the type of the module's weight, in safetensors' spelling. Raises BindingError (GS-404) as `shape`."""
        return self.tensors.entries[self._name(path)].dtype

    def check_shape(self, path: str, actual: tuple[int, int]) -> None:
        """Raise BindingError (GS-405) where an update of this shape, (out, in), is none of module `path`."""
        if actual != self.shape(path):
            raise misfit(self.folder, path, f"(out, in) {self.shape(path)}", actual)

    def weight(self, path: str) -> Tensor:
        """Return the module's weight as (out, in), in its own dtype.

        Raises BindingError (GS-404) as `shape`, and InputError: GS-3117 for numbers that are no weights by themselves,
        those of a quantized base, whose scales lie beside them; GS-3142 for NaN or infinite values.
        """
        name = self._name(path)
        if self.is_quantized(path):
            raise InputError(
                "the base is quantized, and its weights are needed as they were", code="GS-3117",
                file=self.tensors.files[name], tensor=name, expected="F32, F16 or BF16",
                actual=self.dtype(path), hint="give the base as it was before it was quantized",
            )  # fmt: skip
        weight = self.tensors[name]
        if not is_finite(weight):
            raise InputError(
                "the model holds NaN or infinite values", code="GS-3142", file=self.tensors.files[name], tensor=name,
                hint="fetch it again; if it was trained, training diverged: use an earlier checkpoint",
            )  # fmt: skip
        return weight.T if self.is_transposed(path) else weight

    def is_quantized(self, path: str) -> bool:
        """Return whether the module's weight is of numbers that mean nothing without their scales."""
        name = self.find(path)
        return name is not None and self.tensors.entries[name].dtype not in FLOATS

    def _name(self, path: str) -> str:
        name = self.find(path)
        if name is None or len(self.tensors.shape(name)) != 2:
            raise BindingError(
                "the base has no such module, or it has no matrix", code="GS-404", file=self.folder, tensor=path,
                actual="no tensor" if name is None else f"{name} {self.tensors.shape(name)}",
                hint="give the base that the adapter was trained on",
            )  # fmt: skip
        return name

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return every module with a matrix, by the checkpoint's own names -> (out, in); embeddings among them."""
        ends = [
            name for name, entry in self.tensors.entries.items() if name.endswith(".weight") and len(entry.shape) == 2
        ]
        return {path: self.shape(path) for path in (name.removesuffix(".weight") for name in ends)}
