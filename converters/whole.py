"""What lies in an adapter's file beside its factors: modules saved whole, copies of the base's own, trained biases.

PEFT saves modules_to_save, embeddings that it takes for changed, and biases where `bias` says so. Each tensor is
carried, adds nothing, or is lost: plain LoRA cannot hold it, and the user decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from converters.checks import check_numbers
from converters.reading import Beyond, Inputs
from converters.source import Source
from gora_serve.adapter.format import CARRIED_DTYPES, unusual_type
from gora_serve.adapter.names import CLASSIFIERS, PREFIX, holders
from gora_serve.adapter.peft_config import saved_modules
from gora_serve.adapter.tensors import Renamed
from gora_serve.deploy.base import EMBEDDINGS, HEADS, BaseWeights
from gora_serve.errors import BindingError

CARRIED = "modules are carried whole: PEFT loads them, vLLM serves only a classifier's head so"
# What PEFT's wrappers put into the names of a state dict; `original_module` is what stood there before training.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(?:\.default)?)(?=\.)")
_ORIGINAL = ".original_module."
_FACTOR = re.compile(r"\.lora_|\.token_adapter\.|\.trainable_tokens_")
_LORA_BIAS = re.compile(r"\.lora_B(\.default)?\.bias$")


@dataclass
class Whole:
    """Tensors that are no factors. carried: parameter path -> tensor name. known, lost: tensor name -> why.

    Of those lost, what a merged model can hold: `replaced` and `grounds` as `Beyond` has them; biases: of B, parameter
    path -> tensor name.
    """

    carried: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    grounds: dict[str, str] = field(default_factory=dict)

    def tensors(self, source: Source) -> Mapping[str, Tensor]:
        """Return what is carried, read when it is asked for: parameter path -> tensor.

        Raises InputError (GS-3119) for types of no module.
        """
        for name in self.carried.values():
            if (dtype := source.tensors.entries[name].dtype) not in CARRIED_DTYPES.values():
                raise unusual_type(name, dtype, file=source.tensors.files[name])
        return Renamed(source.tensors, self.carried)

    def beyond(self, scale_of: Callable[[str], float]) -> Beyond:
        """Return what a merged model can hold of it. scale_of: a module's path -> its LoRA scale."""
        added = {bias: (name, scale_of(bias.removesuffix(".bias"))) for bias, name in self.biases.items()}
        return Beyond(self.replaced, added, grounds=self.grounds)

    @property
    def is_served(self) -> bool:
        """Whether an engine takes what lies beside the factors: nothing, or a classifier's head."""
        heads = all(parameter.split(".")[-2:][0] in CLASSIFIERS for parameter in self.carried)
        return heads and not self.lost

    @property
    def notes(self) -> tuple[str, ...]:
        return (CARRIED,) if self.carried else ()


def sort_whole(source: Source, inputs: Inputs, adapted: Collection[str]) -> Whole:
    """Sort the tensors that are no factors; those whose names say nothing are left out.

    adapted: the paths of the modules that have factors. Raises BindingError (GS-450) for embeddings of another
    vocabulary than the base's.
    """
    saved = tuple(saved_modules(source.config, file=source.config_file))
    found = Whole()
    for name in source.tensors:
        if _LORA_BIAS.search(name):
            _sort_bias(source, name, found)
        elif name.startswith(PREFIX) and not _FACTOR.search(name):
            parameter = _WRAPPED.sub("", name.removeprefix(PREFIX))
            module = parameter.rpartition(".")[0]
            # PEFT saves a module with all that is in it. Its own rule: a name is any end of the path.
            is_saved = any(one.endswith(saved) for one in holders(parameter))
            if is_saved and module not in adapted and _ORIGINAL not in name:
                _carry(source, name, parameter, found)
            elif parameter.endswith((".weight", ".bias")):
                _sort_parameter(source, inputs, name, parameter, module in adapted, found)
    return found


def _carry(source: Source, name: str, parameter: str, found: Whole) -> None:
    """Carry a tensor; of two that PEFT saves of one parameter, where they are the same, the first."""
    first = found.carried.setdefault(parameter, name)
    if first == name:
        return
    if torch.equal(source.tensors[first], source.tensors[name]):
        found.known[name] = f"the same as {first}"
    else:
        found.lost[name] = f"another value than {first} has"


def _sort_bias(source: Source, name: str, found: Whole) -> None:
    check_numbers(source, [name])
    if source.tensors[name].any():
        found.lost[name] = "lora_bias: a bias that B adds, which plain LoRA does not have"
        found.biases[f"{_LORA_BIAS.sub('', name.removeprefix(PREFIX))}.bias"] = name
    else:
        found.known[name] = "zero"


def _sort_parameter(source: Source, inputs: Inputs, name: str, parameter: str, adapted: bool, found: Whole) -> None:
    """Sort a parameter of the base's: its own, or one that was trained."""
    base = inputs.base
    if base is None:
        found.known[name] = "of the base's own name; no base was given to compare it with"
        return
    ours = base.counterpart(parameter)
    if ours is None:
        return
    module, _, kind = parameter.rpartition(".")
    if inputs.merging and is_resized(source.tensors.shape(name), base, ours):
        _sort_resized(source, base, name, parameter, adapted, found)
        return
    check_vocabulary(name, source.tensors.shape(name), base, ours, file=source.weights)
    reason = same(source.tensors[name], base.tensors[ours])
    if reason:
        found.known[name] = reason
    elif is_vocabulary(module) and kind == "weight" and not adapted and _ORIGINAL not in name:
        _carry(source, name, parameter, found)
    else:
        found.lost[name] = f"a {kind} that is not the base's own: trained, or from another base"
        if (not adapted or kind == "bias") and _ORIGINAL not in name:
            found.replaced[parameter] = name


def _sort_resized(source: Source, base: BaseWeights, name: str, parameter: str, adapted: bool, found: Whole) -> None:
    """Sort embeddings or a head of a resized vocabulary: carried whole, or what the factors were trained over.

    Raises BindingError (GS-4402) where these are not the base's own rows, as far as it has them.
    """
    if _ORIGINAL in name:
        found.known[name] = "what stood there before training"
        return
    if not adapted:
        _carry(source, name, parameter, found)
        return
    ours = base.tensors[str(base.counterpart(parameter))]
    theirs = source.tensors[name]
    rows = min(len(ours), len(theirs))
    if same(theirs[:rows], ours[:rows]) is None:
        raise BindingError(
            "the embeddings that the adapter was trained over are not this base's", code="GS-4402", file=source.weights,
            tensor=name, expected=f"the base's {rows} rows, and others behind them",
            hint="give the base that the adapter was trained on",
        )  # fmt: skip
    found.lost[name] = "the embeddings of a resized vocabulary"
    found.grounds[parameter.rpartition(".")[0]] = name


def is_vocabulary(module: str) -> bool:
    """Tell whether a module has a row for each token."""
    return module.rpartition(".")[2] in EMBEDDINGS + HEADS


def is_resized(actual: tuple[int, ...], base: BaseWeights, ours: str) -> bool:
    """Tell whether a tensor is the base's `ours` but for the number of tokens."""
    expected = base.tensors.shape(ours)
    return actual != expected and actual[1:] == expected[1:] and is_vocabulary(ours.rpartition(".")[0])


def check_vocabulary(name: str, actual: tuple[int, ...], base: BaseWeights, ours: str, *, file: Path) -> None:
    """Raise BindingError (GS-450) for embeddings or a head of another vocabulary than the base's."""
    expected = base.tensors.shape(ours)
    if is_resized(actual, base, ours):
        raise BindingError(
            "the base has another vocabulary", code="GS-450", file=file, tensor=name,
            expected=f"{expected[0]} tokens", actual=f"{actual[0]} tokens",
            hint="resize the base to the same vocabulary first, or serve the merged model as a base of its own",
        )  # fmt: skip


def same(theirs: Tensor, ours: Tensor) -> str | None:
    """Return why a tensor adds nothing, or None: it is the base's in its own dtype, widened or rounded to it.

    A wider tensor is never rounded to the base's dtype: that would hide a small change.
    """
    if theirs.shape != ours.shape or theirs.dtype.itemsize == 1:  # of 8 bits: scales elsewhere say what they stand for
        return None
    if theirs.dtype == ours.dtype:
        return "the base's own" if torch.equal(theirs, ours) else None
    return f"the base's own, as {theirs.dtype}" if torch.equal(theirs, ours.to(theirs.dtype)) else None
