"""A fully fine-tuned model, given as its folder: each matrix less the base's, to be truncated to LoRA.

What is no matrix of a linear layer (norms, biases, embeddings, experts) cannot be LoRA. It must be the base's, or the
user says what becomes of it. Nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from converters.patterns import LEFT_OUT, Patterns
from converters.reading import Inputs, Reading
from converters.source import Source
from converters.whole import CARRIED, check_vocabulary, is_resized, same
from gora_serve.adapter.factors import Adapter, BaseId, LazyModules, LoraFactors
from gora_serve.adapter.linalg import as_factors
from gora_serve.adapter.names import CLASSIFIERS, saved_as
from gora_serve.adapter.tensors import Renamed
from gora_serve.deploy.base import COMPUTED, EMBEDDINGS, FILE_HEAD, HEADS, BaseWeights
from gora_serve.errors import BindingError, InputError, counted, listed

# Modules with a matrix that are no linear layer of their own in transformers' models.
NOT_LINEAR = re.compile(r"\.experts\.|(emb|wpe|wte|shared|relative_attention_bias)[^.]*$|\.(gate|router)$")
EVERYTHING = (".",)  # what a merged model takes whole
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


@dataclass
class _Sorted:
    """The model's tensors, sorted. modules: path -> tensor name. problems: name -> what is wrong with it."""

    modules: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read(source: Source, inputs: Inputs) -> Reading:
    """Read a full fine-tune: delta = W - W0 of each linear layer, exactly, whatever the two dtypes.

    inputs.leave_out drops a change, inputs.carry keeps a module whole. Raises InputError (GS-3157) with the relative
    changes of all other tensors that LoRA cannot hold, BindingError GS-450 for another vocabulary and GS-451 for
    another base, UsageError GS-236 and GS-237 for names that make no sense.
    """
    base, model = inputs.need_base("a full fine-tune"), BaseWeights(source.folder)
    if model.is_bare:  # else the names are the model's
        base.need_model_names()
    leave_out, carry = (
        Patterns("--leave-out", inputs.leave_out),
        Patterns("--carry", inputs.carry or EVERYTHING[: inputs.merging]),
    )
    found = _sort(model, base, leave_out, carry, merging=inputs.merging)
    _refuse_problems(source, found)
    leave_out.check()
    carry.check()

    def delta(path: str) -> LoraFactors:
        return as_factors(model.weight(path).double() - base.weight(path).double())

    carried = Renamed(model.tensors, found.carried)
    modules = LazyModules(found.modules, delta)
    adapter = Adapter(modules, BaseId(""), carried=carried, task_type=_task_of_adapter(model, found))
    return Reading(
        adapter,
        frozenset(found.modules.values()) - found.known.keys(),
        frozenset(found.carried.values()),
        found.known,
        full_rank=True,
        method="W - W0 of each matrix",
        notes=tuple(_notes(found, model, base)),
    )


def _sort(model: BaseWeights, base: BaseWeights, leave_out: Patterns, carry: Patterns, *, merging: bool) -> _Sorted:
    found = _Sorted()
    whole = {name.rpartition(".")[0] for name in model.tensors if carry.match(name)}  # modules that are kept whole
    for name in model.tensors:
        ours = base.counterpart(name)
        path, _, kind = _longer(name, ours).rpartition(".")
        path = _head_in_model(path, base)
        if COMPUTED.search(name) and (ours is None or not _is_vector(model, name)):
            found.known[name] = "computed by the model itself"
            continue
        if ours is not None and not (merging and is_resized(model.tensors.shape(name), base, ours)):
            _check_shape(model, base, name, ours)
        if leave_out.match(name):
            _leave_out(model, base, name, ours, found)
        elif name.rpartition(".")[0] in whole:
            found.carried[f"{path}.{kind}"] = name
        elif ours is not None and kind == "weight" and _is_linear(model, path, name):
            found.modules[path] = name
        elif ours is not None and (reason := same(model.tensors[name], base.tensors[ours])):
            found.known[name] = reason
        else:
            found.problems[name] = _change(model, base, name, ours)
    _carry_shared(model, found)
    _tied_head(model, base, found)
    _missing(model, base, leave_out, found)
    return found


def _leave_out(model: BaseWeights, base: BaseWeights, name: str, ours: str | None, found: _Sorted) -> None:
    if ours is not None and (reason := same(model.tensors[name], base.tensors[ours])):
        found.known[name] = reason
        return
    found.known[name] = f"{LEFT_OUT}, relative change {_change(model, base, name, ours)}"
    found.left_out.append(name)


def _longer(name: str, ours: str | None) -> str:
    """Return the longer spelling of one name: the model's own, unless the base's alone has the first part."""
    return ours if ours is not None and ours.endswith(f".{name}") else name


def _head_in_model(path: str, base: BaseWeights) -> str:
    """Return what the model calls a module that its files call embed_out, and others as they are."""
    return base.head if path == FILE_HEAD else path


def _is_linear(model: BaseWeights, path: str, name: str) -> bool:
    shape = model.tensors.shape(name)
    return len(shape) == 2 and 0 not in shape and (model.is_head(path) or not NOT_LINEAR.search(path))


def _is_vector(model: BaseWeights, name: str) -> bool:
    return len(model.tensors.shape(name)) == 1


def _tied_head(model: BaseWeights, base: BaseWeights, found: _Sorted) -> None:
    """A head without a tensor of its own follows the embeddings: carried with them, or compared with the base's own."""
    if any(name.split(".")[-2:-1] and name.split(".")[-2] in HEADS for name in model.tensors):
        return
    own = [name for name in base.tensors if name.endswith(".weight") and name.split(".")[-2] in HEADS]
    if own and (tied := model.find(own[0].removesuffix(".weight"))):
        head = _head_in_model(own[0].removesuffix(".weight"), base)
        if tied in found.carried.values():
            found.carried[f"{head}.weight"] = tied
        else:
            found.modules[head] = tied
        return
    names = [name for parameter, name in found.carried.items() if parameter.split(".")[-2] in EMBEDDINGS]
    if _task(model) != "SEQ_CLS" and (tied := model.find(model.head)) in names:
        found.carried[f"{model.head}.weight"] = str(tied)


def _carry_shared(model: BaseWeights, found: _Sorted) -> None:
    """Encoder and decoder of T5, BART and their kin read `shared` through modules of their own: carry these too."""
    for parameter, name in list(found.carried.items()):
        *before, last, _ = parameter.split(".")
        for half in ("encoder", "decoder") if last == "shared" else ():
            stack = ".".join([*before, half])
            if any(other.startswith(f"{stack}.") for other in model.tensors):
                found.carried.setdefault(f"{stack}.embed_tokens.weight", name)


def _missing(model: BaseWeights, base: BaseWeights, leave_out: Patterns, found: _Sorted) -> None:
    for name in base.tensors:
        if not (model.counterpart(name) or COMPUTED.search(name) or leave_out.match(name)):
            found.problems[name] = "the model lacks it"


def _check_shape(model: BaseWeights, base: BaseWeights, name: str, ours: str) -> None:
    actual, expected = model.tensors.shape(name), base.tensors.shape(ours)
    if actual == expected:
        return
    check_vocabulary(name, actual, base, ours, file=model.folder)
    raise BindingError(
        "the model is no fine-tune of this base: a tensor has another shape", code="GS-451", file=model.folder,
        tensor=name, expected=expected, actual=actual, hint="give the base that the model was trained from",
    )  # fmt: skip


def _change(model: BaseWeights, base: BaseWeights, name: str, ours: str | None) -> str:
    """Return |W - W0| / |W0| as text."""
    if ours is None:
        return "not in the base"
    before = base.tensors[ours].double()
    change = float((model.tensors[name].double() - before).norm() / before.norm())
    return f"{change:.4g}"


def _refuse_problems(source: Source, found: _Sorted) -> None:
    if not found.problems:
        return
    lines = [f"{name} {change}" for name, change in found.problems.items()]
    count = f"{len(lines)} tensors" if len(lines) > 1 else "a tensor"
    raise InputError(
        f"{count} changed that LoRA cannot hold (norms, biases, embeddings): they would be lost",
        code="GS-3157", file=source.folder, tensor=next(iter(found.problems)), actual=listed(lines, 12, between="; "),
        expected="the base's own; the numbers are |W - W0| / |W0|",
        hint="--carry NAMES keeps modules whole (PEFT loads them, vLLM does not), --leave-out NAMES drops the change",
    )  # fmt: skip


def _task(model: BaseWeights) -> str | None:
    """PEFT's word for the kind of model, where it generates text or classifies it.

    A reader of images too is ForConditionalGeneration, without an encoder.
    """
    names = model.config.get("architectures") or ["ForCausalLM"]
    task = next((task for end, task in TASKS.items() if str(names[0]).endswith(end)), None)
    return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and not model.config.get("is_encoder_decoder") else task


def _task_of_adapter(model: BaseWeights, found: _Sorted) -> str | None:
    """The same, but for a classifier whose head is LoRA: PEFT loads that over any model by no word alone."""
    task = _task(model)
    is_whole = any(module.rpartition(".")[2] in CLASSIFIERS for module in saved_as(found.carried))
    return None if task == "SEQ_CLS" and not is_whole else task


def _notes(found: _Sorted, model: BaseWeights, base: BaseWeights) -> Iterable[str]:
    if found.left_out:
        where = "tensors.without_effect in conversion.json names them"
        yield f"the changes of {counted(len(found.left_out), 'tensor')} are left out: {where}"
    if found.carried:
        yield CARRIED
    kinds = [{one.tensors.entries[name].dtype for name in one.tensors} for one in (model, base)]
    if kinds[0] != kinds[1]:
        words = [", ".join(sorted(kind)) for kind in kinds]
        yield f"model {words[0]}, base {words[1]}: their rounding is part of the difference"
