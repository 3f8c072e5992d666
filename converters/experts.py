"""LoRA of parameters (PEFT's `target_parameters`): a mixture's experts, which transformers fuses while it loads them.

PEFT wraps a module once for each parameter, its first parameter innermost: `experts.base_layer.lora_A` is
gate_up_proj's, `experts.lora_A` is down_proj's. What is read here is put back into the checkpoint's own modules, one
expert at a time: `experts.3.gate_proj`, or `block_sparse_moe.experts.3.w1`.

In every model whose checkpoint has its experts one by one, transformers stacks them as (E, out, in), the rows of
gate_proj before those of up_proj, nothing transposed and nothing interleaved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import TYPE_CHECKING

import torch

from converters.checks import check_shape
from converters.reading import Inputs
from converters.source import Source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.peft_config import foreign_pattern, foreign_scales, pattern_values
from gora_serve.deploy.base import BaseWeights, misfit
from gora_serve.deploy.merge_values import Experts
from gora_serve.errors import InputError

if TYPE_CHECKING:
    from converters.pairs import Pair

WRAPPER = ".base_layer"
# Parameters in the order in which the models have them -> what a checkpoint may call the matrices in them.
PARAMETERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "weight": (),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
RENAMED = (".mlp.", ".block_sparse_moe.")  # the model's name and the checkpoint's, of Mixtral and its kin
NOTE = "PEFT loads experts one by one only where all of them have one rank: --form padded; it refuses others."
TURNED = ("gpt_oss", "aria", "openai_privacy_filter")  # models whose fused experts are (E, in, out)
STRAIGHT = (0, 19, 1)  # the first PEFT that takes (E, out, in) for what it is; older ones train the transpose

Matrices = tuple[tuple[tuple[str, int], ...], ...]  # of each expert, each matrix: its module path, and its rows


@dataclass(frozen=True)
class Stack:
    """The factors of one parameter: A (E r, in), expert after expert, and B (out, r E), where column j E + e is the
    j-th of expert e.

    parameter: its path in the model. modules: what it is made of in the base. inputs: columns of these modules. rank:
    of one expert.
    """

    parameter: str
    pair: Pair
    modules: Matrices
    inputs: int
    rank: int
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        return sum(rows for _, rows in self.modules[0]), self.inputs


@dataclass(frozen=True)
class Wrapped:
    """The modules that were adapted by way of a parameter. taken: the paths that their factors have in the file.
    fused: there are experts among them, which vLLM 0.32 does not load as they are, but where the model is fused too.
    stacks: the updates of parameters that the base keeps fused, which only a merged model can hold.
    """

    modules: Mapping[str, LoraFactors]
    taken: frozenset[str]
    fused: bool = False
    stacks: Mapping[str, Experts] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of what is written."""
        return (NOTE,) if self.fused else ()

    def beside(self, others: Mapping[str, LoraFactors]) -> LazyModules:
        """Return these modules and others, as one."""
        mine = self.modules
        return LazyModules([*others, *mine], lambda path: mine[path] if path in mine else others[path])


def read_parameters(source: Source, pairs: Mapping[str, Pair], inputs: Inputs) -> Wrapped:
    """Read those of the pairs that adapt a parameter; none, and no need of the base, where the file says nothing of it.

    Raises InputError: GS-3120 where the base keeps the experts fused, GS-3121 to GS-3123 where factors, configuration
    and base contradict each other, GS-3124 where it is not known which factor is which. BindingError: GS-404 where the
    base has no such experts, GS-405 where they have another shape.
    """
    if not source.config.get("target_parameters") and not any(path.endswith(WRAPPER) for path in pairs):
        return Wrapped({}, frozenset())
    base = inputs.need_base("LoRA of parameters")
    targeted = dict(_targeted(source, pairs, base, merging=inputs.merging))
    whole = {parameter: pairs[path] for path, parameter in targeted.items() if _fused_name(base, parameter)}
    stacks = [
        _stack(source, base, parameter, pairs[path]) for path, parameter in targeted.items() if parameter not in whole
    ]
    fused = [stack for stack in stacks if not stack.parameter.endswith(".weight")]
    turned = _are_turned(source, base, fused)
    places = {
        path: (stack, expert, part)
        for stack in stacks
        for expert, modules in enumerate(stack.modules)
        for part, (path, _) in enumerate(modules)
    }

    def factors(path: str) -> LoraFactors:
        stack, expert, part = places[path]
        A = source.tensors[stack.pair.A][expert * stack.rank : (expert + 1) * stack.rank]  # (r, in)
        B = source.tensors[stack.pair.B][:, expert :: len(stack.modules)]  # (out, r)
        if turned and stack in fused:
            A, B = B.T, A.T
        return LoraFactors(A, torch.split(B, [rows for _, rows in stack.modules[expert]])[part], stack.scale)

    modules = LazyModules(places, factors)
    return Wrapped(modules, frozenset(targeted), bool(fused), FusedStacks(source, base, whole))


class FusedStacks(Mapping[str, Experts]):
    """The updates of fused parameters by their paths, read when they are asked for."""

    def __init__(self, source: Source, base: BaseWeights, pairs: Mapping[str, Pair]) -> None:
        """Raises InputError: GS-3121, GS-3124; BindingError (GS-405)."""
        self._source, self._pairs = source, pairs
        self._sizes = {path: _fused_sizes(source, base, path, pair) for path, pair in pairs.items()}

    def __getitem__(self, path: str) -> Experts:
        pair, (experts, scale, turned) = self._pairs[path], self._sizes[path]
        A, B = self._source.tensors[pair.A], self._source.tensors[pair.B]
        stacked = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        return Experts(A.reshape(experts, -1, A.shape[1]), stacked.double() * scale, turned)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


def _fused_name(base: BaseWeights, parameter: str) -> str | None:
    """Return the base's tensor where it keeps a parameter of several experts in one."""
    name = base.find_parameter(parameter)
    return name if name is not None and len(base.tensors.shape(name)) == 3 else None


def _fused_sizes(source: Source, base: BaseWeights, parameter: str, pair: Pair) -> tuple[int, float, bool]:
    """Return the number of experts, the scale, and whether the update is that of the stored matrices turned.

    Raises InputError: GS-3121 for another rank, GS-3124 where square experts leave open which factor is which;
    BindingError (GS-405) for other shapes.
    """
    experts, height, width = base.tensors.shape(str(_fused_name(base, parameter)))
    for name in (pair.A, pair.B):
        check_shape(source, name, (None, None))
    (rows, into), (out, columns) = source.tensors.shape(pair.A), source.tensors.shape(pair.B)
    if rows != columns or rows % experts:
        raise InputError(
            "the factors do not hold the configured rank for each expert", code="GS-3121", file=source.weights,
            tensor=pair.A, expected=f"A ({experts} r, in) and B (out, r {experts})",
            actual=f"A has {rows} rows, B {columns} columns",
            hint="give the base that the adapter was trained on",
        )  # fmt: skip
    if (out, into) not in ((height, width), (width, height)):
        raise misfit(base.folder, parameter, f"(out, in) {(height, width)} for each expert, or turned", (out, into))
    turned = (out, into) != (height, width)
    if height == width:
        turned = base.config.get("model_type") in TURNED or _is_old(source)
    scale = foreign_scales(source.config, {parameter: rows // experts}, file=source.config_file)[parameter]
    return experts, scale, turned


def _targeted(
    source: Source, pairs: Mapping[str, Pair], base: BaseWeights, *, merging: bool
) -> Iterator[tuple[str, str]]:
    """Yield (path in the file, path of the parameter in the model) of each wrapper of a parameter."""
    wrappers: dict[str, list[str]] = {}
    for path in sorted(pairs, key=lambda path: path.count(WRAPPER), reverse=True):  # innermost first
        wrappers.setdefault(path.replace(WRAPPER, ""), []).append(path)
    for module, paths in wrappers.items():
        said = [leaf for leaf in PARAMETERS if _is_target(source, module, leaf)]
        fused = [leaf for leaf in said if merging and _fused_name(base, f"{module}.{leaf}")]
        leaves = [leaf for leaf in said if leaf in fused or _modules_of(base, f"{module}.{leaf}")]
        if said and not leaves and base.find(module) is None:
            _refuse_module(base, module)
        if not leaves and not any(path.endswith(WRAPPER) for path in paths):
            continue  # by target_modules
        if [path.count(WRAPPER) for path in paths] != list(range(len(leaves)))[::-1]:
            raise InputError(
                "target_parameters and the tensors disagree: it is not known which parameter is which", code="GS-3123",
                file=source.weights, tensor=paths[0], actual=f"the factors of {', '.join(sorted(paths))}",
                expected=f"those of {', '.join(leaves) or 'no parameter'}, as target_parameters says",
                hint="put the two files of one run together; if they are, fetch the adapter again: it is not whole",
            )  # fmt: skip
        yield from zip(paths, (f"{module}.{leaf}" for leaf in leaves), strict=True)


def _is_target(source: Source, module: str, leaf: str) -> bool:
    """PEFT's rule: a target is the parameter's path, or how it ends."""
    targets = source.config.get("target_parameters") or []
    return any(f".{module}.{leaf}".endswith(f".{target}") for target in targets)


def _stack(source: Source, base: BaseWeights, parameter: str, pair: Pair) -> Stack:
    modules = _modules_of(base, parameter)
    for name in (pair.A, pair.B):
        check_shape(source, name, (None, None))
    (rows, _), columns = source.tensors.shape(pair.A), source.tensors.shape(pair.B)[1]
    rank = rows // len(modules)
    ranks = pattern_values(foreign_pattern(source.config, "rank_pattern", file=source.config_file), parameter)
    ranks = ranks or [source.config.get("r", rank)]
    if rows != columns or not any(type(one) is int and one > 0 and rows % one == 0 for one in ranks):
        raise InputError(
            "the factors do not hold the configured rank for each expert", code="GS-3121", file=source.weights,
            tensor=pair.A, expected=f"A (E r, in) and B (out, r E) with r {ranks[0]}",
            actual=f"A has {rows} rows, B {columns} columns",
            hint="correct r or rank_pattern in adapter_config.json, with lora_alpha as it was in training",
        )  # fmt: skip
    if rank not in ranks or rows % len(modules):
        raise InputError(
            "the adapter and the base have other numbers of experts", code="GS-3122", file=source.weights,
            tensor=pair.A, expected=f"{len(modules)} experts of rank {ranks[0]}", actual=f"{rows} rows in all",
            hint="give the base that the adapter was trained on; or correct r, if it is wrong",
        )  # fmt: skip
    scale = foreign_scales(source.config, {parameter: rank}, file=source.config_file)[parameter]
    return Stack(parameter, pair, modules, base.shape(modules[0][0][0])[1], rank, scale)


def _modules_of(base: BaseWeights, parameter: str) -> Matrices:
    """Return the base's own modules in a parameter, the one of a plain weight; () where the base has none."""
    stem, _, leaf = parameter.rpartition(".")
    for place in dict.fromkeys((stem, stem.replace(*RENAMED))):
        if leaf == "weight" and base.find(place) is not None:
            return (((place, base.shape(place)[0]),),)
        for names in PARAMETERS[leaf]:
            paths = ([f"{place}.{expert}.{name}" for name in names] for expert in count())
            whole = takewhile(lambda expert: all(map(base.find, expert)), paths)
            if found := tuple(tuple((path, base.shape(path)[0]) for path in expert) for expert in whole):
                return found
    return ()


def _refuse_module(base: BaseWeights, module: str) -> None:
    """Raise for a module with parameters that the base has nowhere: InputError GS-3120, or BindingError GS-404."""
    layer = re.search(r"[^.]+\.\d+\.", module)
    fused = [
        name for name, entry in base.tensors.entries.items()
        if layer and f".{layer.group()}" in f".{name}" and len(entry.shape) > 2 and entry.shape[1] > 1
    ]  # fmt: skip
    if fused:
        raise InputError(
            "the base keeps its experts fused in one tensor: their update is no matrix of a module", code="GS-3120",
            file=base.folder, tensor=module, actual=f"{fused[0]} {base.tensors.shape(fused[0])}",
            hint="gora-serve merge BASE -a ADAPTER --output DIR is exact: serve the merged model",
        )  # fmt: skip
    base.shape(module)


def _are_turned(source: Source, base: BaseWeights, stacks: list[Stack]) -> bool:
    """Tell whether A and B are those of the transposed experts, as PEFT before 0.19.1 trained them.

    The shapes say it, or the version where all matrices are square.
    """
    fits = {stack.parameter: (_shape(source, stack), stack.shape) for stack in stacks}
    turned = any(found == shape[::-1] != shape for found, shape in fits.values())
    for parameter, (found, shape) in fits.items():
        if found != (shape[::-1] if turned else shape):
            raise misfit(base.folder, parameter, f"(out, in) {shape} for each expert", found)
    if not fits or any(shape != shape[::-1] for _, shape in fits.values()):
        return turned
    return _is_old(source)


def _is_old(source: Source) -> bool:
    """Tell whether PEFT was one that takes (E, out, in) for its transpose. Raises InputError (GS-3124)."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(source.config.get("peft_version")))
    if version is None:
        raise InputError(
            "the experts are square: it is not known whether A reads their inputs or their outputs", code="GS-3124",
            file=source.config_file, expected="peft_version", actual=source.config.get("peft_version"),
            hint='write the "peft_version" that it was trained with; before 0.19.1, A read the outputs',
        )  # fmt: skip
    return tuple(map(int, version.groups())) < STRAIGHT


def _shape(source: Source, stack: Stack) -> tuple[int, int]:
    """(out, in), by the factors."""
    return source.tensors.shape(stack.pair.B)[0], source.tensors.shape(stack.pair.A)[1]
