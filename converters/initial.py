"""P0 = s B0 A0, what an initialisation took out of the base: where it is found, in order of trust, and its subtraction.

The adapter as it was right after initialisation (--init-adapter, or a sub-folder that tools leave), else the edited
base (W0 - W_res), else what a family can compute from W0 because it is unique. An initial adapter of another run is
noticed and refused: by its modules and scales, by what it has in common with the trained one, by the base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from converters import lora
from converters.decompose import transposed
from converters.detect_files import BACKUP, siblings
from converters.detect_weights import spread
from converters.fresh import is_rounded
from converters.kinship import check_kinship, check_plain, check_same_form
from converters.mutated import MutatedBase
from converters.reading import Inputs, Reading
from converters.source import CONFIG, Source, open_source
from gora_serve.adapter.factors import LazyModules, LoraFactors
from gora_serve.adapter.linalg import norm, subtract
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, GoraError, InputError, UsageError

ROUNDED_NOTE = "The edited base was rounded to 16 bits: that has full rank, and no adapter can hold it."
IF_ROUNDED = f"If the base lay in its 16 bits in training: {ROUNDED_NOTE}"
GROWN = 0.03  # cosine of the trained update with P0: 0.06 after 150 large steps at rank 1, below 0 where swapped

Factors = Callable[[str, int], LoraFactors]  # (module path, rank) -> P0
Check = Callable[[str, LoraFactors, Path], None]  # raises where P0 of an initial adapter cannot be


@dataclass(frozen=True)
class Initial:
    """P0 by module, and in one line where it comes from. edited: W_res, where it is at hand. files: what was read."""

    modules: Mapping[str, LoraFactors]
    method: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    edited: BaseWeights | None = None


@dataclass(frozen=True)
class Rules:
    """What a family knows about its own initialisation.

    compute: P0 from W0 (or from a cache), where unique; `computed` says how. check: of an initial adapter against W0.
    refine: P0 from W0 and an initial adapter that was rounded to 16 bits. files: what `compute` reads.
    stored: how an initial adapter is read.
    quantized, unscaled: LoftQ's base is Q, and its B0 A0 were made without the scale. untransposed: the family's
    initialisation ignores that Conv1D keeps (in, out), so that what it took out is the transpose of what it put in.
    """

    family: str
    compute: Factors | None = None
    computed: str = ""
    check: Check | None = None
    refine: Callable[[str, LoraFactors], LoraFactors] | None = None
    files: tuple[Path, ...] = ()
    stored: Callable[[Source, Inputs], Mapping[str, LoraFactors]] = lora.modules_of
    quantized: bool = False
    unscaled: bool = False
    untransposed: bool = False
    in_adapter: bool = True  # whether P0 is in the adapter as it was after initialisation
    mutated: Path | None = None  # found by the family itself, where no flag is given
    notes: tuple[str, ...] = ()


def read_without_initial(source: Source, inputs: Inputs, rules: Rules) -> Reading:
    """Read an adapter whose initialisation edited the base: what is stored, less P0. Raises as `find_initial`."""
    if inputs.cache is not None and rules.family != "corda":
        raise UsageError(f"--cache is CorDA's; {rules.family} has none", code="GS-233", hint="leave --cache out")
    plain = lora.read(source, inputs)
    trained = plain.adapter.modules
    initial = find_initial(source, inputs, plain, rules, list(lora.modules_of(source, inputs)))

    def update(path: str) -> LoraFactors:
        return subtract(trained[path], initial.modules[path]) if path in initial.modules else trained[path]

    return replace(
        plain,
        adapter=replace(plain.adapter, modules=LazyModules(trained, update)),
        served=None if plain.served is None else trained,
        initial=initial.modules,
        edited=initial.edited,
        method=initial.method,
        files=initial.files,
        notes=(*plain.notes, *rules.notes, *initial.notes),
    )


def find_initial(source: Source, inputs: Inputs, plain: Reading, rules: Rules, stored: Sequence[str]) -> Initial:
    """Return P0 from the most trusted source there is. stored: the modules with factors of their own in the file.

    What was found beside the adapter and does not fit is left aside with a note, where there is another source.
    Raises UsageError (GS-232) where there is none, BindingError where the sources belong to another run or base (GS-405
    for its shapes), InputError (GS-3125) for a head that the base ties to its embeddings.
    """
    base = inputs.need_base(f"{rules.family} edits the base; its conversion")
    paths = [path for path in stored if _can_be_edited(path, plain, base)]
    _refuse_tied(source, base, paths, rules)
    for path in paths:
        base.check_shape(path, plain.adapter.modules[path].shape)
    mutated = inputs.mutated_base or rules.mutated
    pair = MutatedBase(base, BaseWeights(mutated), rules.quantized) if mutated else None
    if pair:
        pair.check(paths)
    if inputs.init_adapter is not None:
        return _from_adapter(inputs.init_adapter, inputs, plain, rules, paths, pair)
    found, aside = _from_found(source, inputs, plain, rules, paths, pair) if rules.in_adapter else (None, ())
    initial = found or _without_adapter(source, plain, rules, paths, pair, base)
    return replace(initial, notes=(*aside, *initial.notes))


def _without_adapter(
    source: Source, plain: Reading, rules: Rules, paths: list[str], pair: MutatedBase | None, base: BaseWeights
) -> Initial:
    if pair:
        return _from_mutated(pair, plain, rules, paths)
    if rules.compute is None:
        raise UsageError(
            f"what the {rules.family} initialisation took out of the base cannot be computed again", code="GS-232",
            file=source.weights, expected="--init-adapter DIR or --mutated-base DIR",
            hint="DIR is the adapter as saved right after its initialisation, or the edited base as saved with it",
        )  # fmt: skip
    compute = rules.compute
    modules = _one_kept(paths, lambda path: compute(path, plain.adapter.modules[path].rank))
    return Initial(modules, f"trained less initial; {rules.computed}", rules.files, _if_rounded(base, paths))


def _one_kept(paths: Iterable[str], factors: Callable[[str], LoraFactors]) -> LazyModules:
    """Return modules that keep the last one: P0 can cost an SVD, and is asked for alone and as part of the update."""
    return LazyModules(paths, lru_cache(maxsize=1)(factors))


def _can_be_edited(path: str, plain: Reading, base: BaseWeights) -> bool:
    """PEFT edits the weights of linear layers and of Conv1D; embeddings and fused experts start from zero."""
    name = base.find(path)
    return path not in plain.adapter.embeddings and name is not None and len(base.tensors.shape(name)) == 2


def _refuse_tied(source: Source, base: BaseWeights, paths: Iterable[str], rules: Rules) -> None:
    """The initialisation edited one tensor that is both: the embeddings lost P0, and LoRA on the head is no help."""
    heads = (path for path in paths if base.is_head(path))
    tied = next((path for path in heads if base.ties_head or base.copied_to_head is not None), None)
    if tied is not None:
        raise InputError(
            f"{rules.family} edited the head, which this base ties to its embeddings: these changed too",
            code="GS-3125", file=source.weights, tensor=tied,
            hint="merge it with the tool that made it, and convert the merged model: --from full",
        )  # fmt: skip


def _from_mutated(pair: MutatedBase, plain: Reading, rules: Rules, paths: list[str]) -> Initial:
    trained = plain.adapter.modules
    modules = _one_kept(paths, lambda path: pair.initial(path, trained[path].rank))
    if rules.in_adapter:
        turned = [path for path in paths if rules.untransposed and pair.base.is_transposed(path)]
        _check_grown(pair, trained, modules, turned)
    return Initial(
        modules,
        f"trained less initial; initial is W0 - W_res at the adapter's rank, from {pair.mutated.folder}",
        (pair.mutated.folder,),
        _remainder_note(pair),
        pair.mutated,
    )


def _check_grown(
    pair: MutatedBase,
    trained: Mapping[str, LoraFactors],
    initial: Mapping[str, LoraFactors],
    turned: Collection[str],
) -> None:
    """Raise BindingError (GS-442) where what the edited base lacks is not in the adapter: the two are swapped.

    turned: modules whose base lost the transpose of what the adapter holds.
    """
    paths = spread(list(initial))
    begun = {path: transposed(initial[path]) if path in turned else initial[path] for path in paths}
    common = sum(_product(trained[path], begun[path]) for path in paths)
    sizes = [sum(norm(one[path]) ** 2 for path in paths) ** 0.5 for one in (trained, begun)]
    cosine = common / (sizes[0] * sizes[1]) if all(sizes) else 0.0
    if cosine < GROWN:
        raise BindingError(
            "the adapter does not hold what the mutated base lacks", code="GS-442", file=pair.mutated.folder,
            expected=f"a cosine of s B A with W0 - W_res above {GROWN}", actual=f"{cosine:.2f}",
            hint="--base is the untouched base and --mutated-base the edited one, of the same run as the adapter",
        )  # fmt: skip


def _product(one: LoraFactors, other: LoraFactors) -> float:
    """Return the inner product of two updates, without building them."""
    inner = (one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)  # (r, r')
    return float(inner.sum()) * one.scale * other.scale


def _from_adapter(
    folder: Path, inputs: Inputs, plain: Reading, rules: Rules, paths: list[str], pair: MutatedBase | None
) -> Initial:
    origin = open_source(folder, pickles=inputs.pickles)
    if origin.config.get("peft_type") == "LORAGA":
        origin = replace(origin, config={**origin.config, "peft_type": "LORA"})
    stored = rules.stored(origin, inputs)
    base = inputs.need_base("an initial adapter")
    check_plain(origin)
    check_same_form(origin, plain.adapter.modules, stored)
    check_kinship(origin, plain.adapter.modules, stored, paths)

    def initial(path: str) -> LoraFactors:
        factors = stored[path]
        factors = LoraFactors(factors.A, factors.B, 1.0) if rules.unscaled else factors
        if rules.untransposed and base.is_transposed(path):
            factors = transposed(factors)
        if rules.check and not pair:
            rules.check(path, factors, origin.weights)
        if pair:
            pair.check_initial(path, factors, origin.weights)
            return factors if rules.quantized else pair.initial(path, factors.rank)
        return rules.refine(path, factors) if rules.refine and is_rounded(factors) else factors

    modules = _one_kept(paths, initial)
    method = f"trained less initial; initial is the adapter as it was saved, {folder}"
    if not pair:
        was_rounded = any(is_rounded(stored[path]) for path in paths[:1])
        return Initial(modules, method, (folder,), (ROUNDED_NOTE,) if was_rounded else ())
    agreed = f"{method}; it agrees with W0 - W_res of {pair.mutated.folder}"
    return Initial(modules, agreed, (folder, pair.mutated.folder), _remainder_note(pair), pair.mutated)


def _from_found(
    source: Source, inputs: Inputs, plain: Reading, rules: Rules, paths: list[str], pair: MutatedBase | None
) -> tuple[Initial | None, tuple[str, ...]]:
    """Return P0 from the first initial adapter beside this one that is its own, and a note for each that is not.

    Such a folder can be a neighbour's: nobody named it. Where there is no other source, its fault is raised.
    """
    aside: list[str] = []
    fault = None
    for folder in left_beside(source, pair.mutated.folder if pair else None):
        try:
            initial = _from_adapter(folder, inputs, plain, rules, paths, pair)
            for path in spread(paths):
                _ = initial.modules[path]  # held to the base
            return initial, tuple(aside)
        except GoraError as err:
            fault = fault or _not_its_own(err, folder)
            aside.append(f"{folder} lies there, but is not this adapter's, and is left aside: {err.what}")
    if fault and not pair and rules.compute is None:
        raise fault
    return None, tuple(aside)


def _not_its_own(err: GoraError, folder: Path) -> GoraError:
    return err.advising(
        f"{folder} was found by itself and is not this adapter's: name its own by --init-adapter, or the edited base "
        "by --mutated-base"
    )


def _if_rounded(base: BaseWeights, paths: Iterable[str]) -> tuple[str, ...]:
    """Nothing in the files says in which type the base lay in training."""
    has_16_bits = any(base.dtype(path) in ("BF16", "F16") for path in paths)
    return (IF_ROUNDED,) if has_16_bits else ()


def _remainder_note(pair: MutatedBase) -> tuple[str, ...]:
    if pair.quantized:
        return ("The edited base is quantized: W0 - Q - P0 has full rank, and no adapter on W0 can hold it.",)
    dtypes = {pair.mutated.tensors.entries[name].dtype for name in pair.mutated.tensors}
    if dtypes <= {"F32", "F64"}:
        return ()
    return (ROUNDED_NOTE,)


def left_beside(source: Source, mutated: Path | None) -> list[Path]:
    """Return what may be the initial adapter, as tools leave it in the adapter's folder, beside it or in W_res."""
    return [one for one in siblings(source, mutated) if (one / CONFIG).is_file() and one.name != BACKUP]
