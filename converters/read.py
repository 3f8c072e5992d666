"""From a path to a checkpoint that is understood: opened, its family decided, every tensor and option accounted for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from converters.base_names import by_base_names
from converters.detect import Detection, decide
from converters.families import family_named
from converters.patterns import LEFT_OUT, Patterns
from converters.reading import Inputs, Reading
from converters.source import CONFIG, Source, open_source
from gora_serve.deploy.trained_on import unquantized_name
from gora_serve.errors import BindingError, InputError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import UNBOUND
from gora_serve.integrity.manifest import Manifest, hash_model
from gora_serve.integrity.named_base import KEY, another_base, is_another, names_of
from gora_serve.integrity.record import ASSERTED, bound_roots, claim_of, read_record
from gora_serve.integrity.verify import check_bound


def read(path: Path, inputs: Inputs, family: str = "auto") -> tuple[Source, Detection, Reading]:
    """Open a checkpoint, decide its family and read it, with every tensor accounted for, by the base's names.

    Raises UsageError for an option that the family has no use for (GS-238, GS-233), and what `decide`, the reader,
    `_account` and `by_base_names` raise.
    """
    source = open_source(path, pickles=inputs.pickles)
    _check_kinds(source)
    detection = decide(source, inputs, family)
    if detection.family != "full" and inputs.carry:
        raise UsageError(
            f"--carry is for a fine-tuned model; this is {detection.family}", code="GS-238", file=source.weights,
            actual=", ".join(inputs.carry), hint="leave --carry out: what an adapter saved whole is carried unasked",
        )  # fmt: skip
    reading = family_named(detection.family).read(source, inputs)
    _check_used(source, detection, reading, inputs)
    reading = _account(source, detection, reading, inputs)
    return source, detection, by_base_names(source, reading, inputs)


def _check_kinds(source: Source) -> None:
    """Raise InputError (GS-3128) for a value in the adapter's configuration of another kind than it must be."""
    task, targets = source.config.get("task_type"), source.config.get("target_parameters") or []
    right = isinstance(targets, list) and all(isinstance(one, str) for one in targets)
    for key, fits, expected in (
        ("task_type", task is None or isinstance(task, str), "a word"),
        ("target_parameters", right, "a list of names"),
    ):
        if not fits:
            raise InputError(
                f"{key} is of another kind than belongs there", code="GS-3128", file=source.config_file,
                expected=expected, actual=str(source.config[key])[:80], hint="fetch the adapter again, or correct it",
            )  # fmt: skip


def _account(source: Source, detection: Detection, reading: Reading, inputs: Inputs) -> Reading:
    """Return the reading with what the user leaves out among the known tensors.

    Raises InputError for a tensor that would be lost: GS-3115 with the reason, GS-3104 where it is not the family's.
    """
    leave_out = Patterns("--leave-out", inputs.leave_out)
    if inputs.merging:  # a model holds it
        held = reading.beyond.tensors
        lost = {name: why for name, why in reading.lost.items() if name not in held}
        reading = replace(reading, lost=lost, carried=reading.carried | held)
    others = source.tensors.keys() - reading.applied - reading.carried - reading.known.keys() - reading.lost.keys()
    lost = {**reading.lost, **dict.fromkeys(sorted(others), f"{detection.family} has no such tensor")}
    left_out = {name: f"{LEFT_OUT}: {why}" for name, why in lost.items() if leave_out.match(name)}
    if detection.family != "full":  # whose reader has checked them, against the base's tensors too
        leave_out.check()
    remaining = [name for name in lost if name not in left_out]
    if remaining:
        more = f" (and {len(remaining) - 1} more)" if len(remaining) > 1 else ""
        known = remaining[0] in reading.lost
        way = _who_holds(remaining[0], reading, inputs) if known else "name the family by --from, or report it"
        raise InputError(
            f"a tensor{more} would be lost", code="GS-3115" if known else "GS-3104", file=source.weights,
            tensor=remaining[0], actual=lost[remaining[0]],
            hint=f"{way}; gora-serve convert --leave-out NAMES drops the tensor",
        )  # fmt: skip
    return replace(reading, known={**reading.known, **left_out})


def _who_holds(lost: str, reading: Reading, inputs: Inputs) -> str:
    """Say where a tensor that plain LoRA does not have keeps its effect: in a model, but for a `lora_bias` of a layer
    that has no bias."""
    added = next((bias for bias, (name, _) in reading.beyond.added.items() if name == lost), None)
    homeless = added is not None and inputs.base is not None and inputs.base.counterpart(added) is None
    if inputs.merging or homeless:
        return "serve the adapter as it is, with PEFT"
    return "gora-serve merge into a model holds it exactly"


def _check_used(source: Source, detection: Detection, reading: Reading, inputs: Inputs) -> None:
    given = {"--init-adapter": inputs.init_adapter, "--mutated-base": inputs.mutated_base, "--cache": inputs.cache}
    for option, path in given.items():
        if path is not None and path not in reading.files:
            raise UsageError(
                f"{option} was not used: {detection.family} has no need of it here", code="GS-233",
                file=source.weights, actual=f"{option} {path}",
                hint=f"leave {option} out; or name the family that needs it by --from",
            )  # fmt: skip


def check_can_be_low_rank(source: Source, detection: Detection, reading: Reading, *, limited: bool) -> None:
    """Raise UsageError (GS-231) for an update of full rank where nothing says how far it is to be truncated."""
    if reading.full_rank and not limited:
        raise UsageError(
            f"a {detection.family} update has full rank: as LoRA it can be had only truncated", code="GS-231",
            file=source.weights, expected="--rank R, --tolerance T or, for merge, --parameters N",
            hint="each gives the nearest LoRA, and its error; merging into a model is the exact way",
        )  # fmt: skip


def refuse_another_base(
    source: Source, detection: Detection, reading: Reading, manifest: Callable[[], Manifest], base: Base
) -> None:
    """Raise BindingError (GS-4352) where nothing binds the adapter and it names another model than `base`.

    Not where an initialisation edited the base: such adapters name the edited one, and are held to the base's weights.
    """
    if reading.initial is None and not detection.assumed and (named := _another(source, reading, manifest, base)):
        names = names_of(base.path, base.name)
        err = another_base(source.folder, source.config_file, named, base.path, names)
        raise err.advising(f"{err.fields['try']}; of a family that bind refuses, correct the name in {CONFIG}")


def _another(source: Source, reading: Reading, manifest: Callable[[], Manifest], base: Base) -> str | None:
    """Return what the adapter calls its base, where nothing binds it and that is another model than this; not the
    edited base that it was read with."""
    named = source.config.get(KEY)
    if not isinstance(named, str) or not named or bound_roots(read_record(source.tensors.metadata, source.weights)):
        return None
    if reading.edited is not None and _is_folder(reading.edited.folder, (Path(named), source.folder / named)):
        return None
    names = names_of(base.path, base.name)
    called = dict.fromkeys((unquantized_name(named), named))  # a base may itself be called as a mirror in 4 bits
    another = all(is_another(name, base.path, lambda: manifest().roots.weights, names) for name in called)
    return named if another else None


def _is_folder(folder: Path, others: Sequence[Path]) -> bool:
    return any(os.path.isdir(one) and folder.samefile(one) for one in others)  # noqa: PTH112 - no error for any name


def held_to_base(
    source: Source, detection: Detection, reading: Reading, manifest: Callable[[], Manifest], base: Base, inputs: Inputs
) -> tuple[str, ...]:
    """Return what to warn of: that nothing proves which base the adapter belongs to, or that it names another, or that
    its settings differ; or instead of the first, that an edited base which nobody named was taken as the one that it
    was trained on.

    manifest: of the base, made where it is needed. Raises BindingError (GS-401) where the adapter itself says that it
    belongs to another base, which is not the edited one that was given beside it either.
    """
    record = read_record(source.tensors.metadata, source.weights)
    bound = bound_roots(record)
    if bound is None:
        if detection.assumed:
            return (detection.assumed,)
        if (named := _another(source, reading, manifest, base)) is not None:
            return (f"the adapter names the base {named}, and {base.name} is given: --base is taken at its word",)
        return (f"{UNBOUND}: --base is taken at its word",)
    actual, assumed = manifest(), (detection.assumed,) if detection.assumed else ()
    edited = inputs.mutated_base if bound.weights != actual.roots.weights else None
    if edited is not None and bound.weights == hash_model(edited, listen=inputs.listen).roots.weights:
        return assumed
    try:
        return assumed + tuple(check_bound(record, bound, actual, source.tensors.keys(), base=base.path))
    except BindingError as err:  # which of several it is
        raise err.saying(f"{source.folder}: {err.what}") from err


def is_asserted(source: Source, weights_root: str) -> bool:
    """Return whether it is a person who says that the adapter belongs to the base with this root: by --base or `bind`.

    It is not where the adapter itself says so, as the tool that made it recorded.
    """
    record = read_record(source.tensors.metadata, source.weights)
    bound = bound_roots(record)
    return bound is None or bound.weights != weights_root or claim_of(record) == ASSERTED
