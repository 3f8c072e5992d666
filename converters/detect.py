"""Which family a checkpoint is of, and how one knows: from the names of its tensors and from its configuration.

Where these say plain LoRA, three things may still be true: the base it was trained on was edited, the adapter was
converted already, or both. So what lies beside it is looked at, and its weights are asked, with the base's. What is
decided comes with the evidence, and with what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters import lora
from converters.detect_files import (
    BACKUP,
    LOFTQ_INIT,
    by_files,
    by_initialization,
    check_configuration,
    is_redrawn,
    siblings,
)
from converters.detect_weights import ORTHOGONAL, Projections, differs, halves, kinship, orthogonality, projections
from converters.kinship import KINSHIP
from converters.reading import Inputs
from converters.residual import base_beside
from converters.source import CONFIG, Source, open_source
from converters.unsupported import refuse_unsupported
from gora_serve.adapter.factors import LoraFactors
from gora_serve.errors import BindingError, GoraError, InputError
from gora_serve.integrity.staging import SEAL

WAYS = "--init-adapter DIR or --mutated-base DIR"
_EDITING = ("pissa", "olora", "corda", "lora_ga", "loftq", "residual")  # their readers subtract an initial update
_PROJECTING = ("pissa", "olora", "corda")  # their initial update is W0 projected on its own rows or columns
_COMPUTED = {  # what else settles it, where the reader can compute the initial update from the base
    "pissa": (f'"pissa" for init_lora_weights in {CONFIG}, if its SVD was the exact one',),
    "olora": ("--from olora",),
}

Modules = Mapping[str, LoraFactors]


@dataclass(frozen=True)
class Detection:
    """The family, the lines of evidence for it, how sure they make us ("certain", "likely", "guess"), what else is
    needed to convert it, and what was taken to be so that nobody has said."""

    family: str
    evidence: tuple[str, ...]
    confidence: str = "certain"
    needs: tuple[str, ...] = ()
    assumed: str = ""


def decide(source: Source, inputs: Inputs, family: str = "auto") -> Detection:
    """Return the family to read a checkpoint by: the one named, or with "auto" the one that `detect` is certain of.

    Raises InputError: GS-3202 where the weights contradict the files, so that a person must decide; GS-3201 where an
    initial update would be subtracted a second time. BindingError (GS-440) where the initialisation is a part of the
    base, and this adapter is none of this base.
    """
    detection = detect(source, inputs) if family == "auto" else _named(source, family)
    if detection.confidence == "likely":
        raise InputError(
            f"the configuration says plain LoRA, the weights say {detection.family}", code="GS-3202",
            file=source.weights, actual="; ".join(detection.evidence),
            hint=f"{' or '.join(detection.needs)}; or --from lora, if the base was not edited",
        )  # fmt: skip
    if detection.family in _EDITING and source.config.get("peft_type") != "LORAGA":
        modules = lora.modules_of(source, inputs)
        _check_not_subtracted(source, detection.family, modules)
        if detection.family in _PROJECTING and not (inputs.init_adapter or inputs.mutated_base):
            _check_part_of_base(source, inputs, detection.family, modules)
    return detection


def detect(source: Source, inputs: Inputs) -> Detection:
    """Decide the family, and say by what.

    Raises InputError: GS-3156 for families that are never LoRA, GS-3200 where nothing fits, GS-3203 to GS-3205 for a
    configuration that contradicts the tensors or cannot be read, GS-3206 for two families at once.
    """
    refuse_unsupported(source)
    found = by_files(source)
    said = check_configuration(source, found.family)
    evidence = (found.evidence, said) if said else (found.evidence,)
    if source.config.get("peft_type") == "LORAGA":
        return Detection("lora_ga", (*evidence, "LORAGA is the official fork of LoRA-GA"))
    if found.family not in ("lora", "dora", "kasa"):
        return Detection(found.family, evidence)
    init = by_initialization(source.config, source.config_file)
    if found.family != "lora":
        _refuse_two(source, found.family, init.family)
        return Detection(found.family, evidence)
    evidence = (*evidence, init.evidence) if said else evidence
    if init.family == "lora":
        return _behind_plain(source, inputs, evidence)
    missing = is_redrawn(source.config) and not (inputs.init_adapter or inputs.mutated_base or inputs.cache)
    return Detection(init.family, evidence, needs=(WAYS,) if missing and not siblings(source) else ())


def _named(source: Source, family: str) -> Detection:
    """Return what --from says. Raises InputError (GS-3203) where the configuration names another family that edits.

    QPiSSA is read as loftq, and `residual` and `lora` are for configurations that are wrong.
    """
    found = by_initialization(source.config, source.config_file).family if family in _EDITING else family
    if found not in ("lora", family) and family not in ("residual", "loftq"):
        raise InputError(
            "--from and the configuration contradict each other", code="GS-3203", file=source.config_file,
            expected=f"init_lora_weights of {family}", actual=str(source.config.get("init_lora_weights")),
            hint=f"--from {found}, or leave --from out; --from residual if the configuration is wrong",
        )  # fmt: skip
    return Detection(family, ("--from says so",))


def _refuse_two(source: Source, family: str, init: str) -> None:
    if init != "lora":
        raise InputError(
            f"{family} over a base that {init} edited: the two together are not converted", code="GS-3206",
            file=source.config_file, actual=f"init_lora_weights {source.config.get('init_lora_weights')}",
            hint="merge it with the tool that made it, and convert the merged model: --from full",
        )  # fmt: skip


def _behind_plain(source: Source, inputs: Inputs, evidence: tuple[str, ...]) -> Detection:
    """Return what a configuration that says plain LoRA stands for."""
    ours = [name for name in (SEAL, "conversion.json") if (source.folder / name).is_file()]
    if ours or "gora_serve" in source.tensors.metadata:
        return Detection("lora", (*evidence, f"written by gora-serve: {ours[0] if ours else 'says its header'}"))
    if inputs.init_adapter or inputs.mutated_base:
        given = "--init-adapter" if inputs.init_adapter else "--mutated-base"
        family = "loftq" if inputs.init_adapter and inputs.init_adapter.name == LOFTQ_INIT else "residual"
        return Detection(family, (*evidence, f"{given} was given: the base was edited"))
    modules = lora.modules_of(source, inputs)
    half = halves(modules)
    if half and half.parallel:
        line = "already converted: A and B hold the trained factors and, turned around, the initial ones"
        return Detection("lora", (*evidence, line, str(half)))
    left, lines, assumed = _beside(source, inputs, modules)
    evidence = (*evidence, *lines)
    return Detection(left, evidence, assumed=assumed) if left else _by_weights(inputs, modules, evidence)


def _beside(source: Source, inputs: Inputs, modules: Modules) -> tuple[str | None, tuple[str, ...], str]:
    """Return the family that an initial adapter or an edited base beside this one decides, what lies there, and what
    is taken to be so where that base alone decides."""
    named = base_beside(source, inputs) if inputs.base is not None else None
    lines, family, assumed = [], None, ""
    for folder in siblings(source, named):
        kin = _kinship(folder, inputs, modules)
        if kin < KINSHIP or folder.name == BACKUP:
            lines.append(f"{folder} lies there, but is no initial adapter of this one")
            continue
        family = "loftq" if folder.name == LOFTQ_INIT else family or "residual"
        lines.append(f"{folder} is its initial adapter: the mean cosine of their rows is {kin:.2f}")
    where = differs(inputs.base, named, list(modules)) if named and inputs.base else "unreadable"
    if where == "targets":
        if family is None and inputs.base is not None:
            family, base = "residual", inputs.base.folder
            assumed = (
                f"the adapter names {named} as its base, which differs from {base} in the adapter's modules: taken as "
                f"the edited base that it was trained on; --from lora adds it to {base} as it is"
            )
        lines.append(f"{named}, the base that {CONFIG} names, differs from --base in the adapter's modules alone")
    elif where == "everywhere":
        lines.append(f"{CONFIG} names {named} as the base, whose weights are not those of --base")
    return family, tuple(lines), assumed


def _kinship(folder: Path, inputs: Inputs, modules: Modules) -> float:
    """Return how much the adapter in `folder` has in common with this one; 0 where it cannot be read."""
    try:
        initial = open_source(folder, pickles=inputs.pickles)
        return kinship(modules, lora.modules_of(initial, inputs))
    except GoraError:
        return 0.0


def _by_weights(inputs: Inputs, modules: Modules, evidence: tuple[str, ...]) -> Detection:
    """Return what the weights say: a part of W0 is in them, or rows are as orthogonal as singular vectors."""
    found = _projections(modules, inputs)
    if found and found.family:
        gram = f"|A Aᵀ - Bᵀ B| is {found.gram:.2f} of their norms (PiSSA is near 0, plain LoRA begins at 1)"
        needs = (f"--from residual with {WAYS}", *_COMPUTED.get(found.family, ()))
        return Detection(found.family, (*evidence, str(found), gram), "likely", needs)
    if found:
        evidence = (*evidence, f"no part of the base is in it: {found}")
    rows = orthogonality(modules)
    if rows is not None and rows < ORTHOGONAL:
        line = f"A's rows are more orthogonal than random ones ({rows:.2f} of their cosine), as LoRA-GA leaves them"
        return Detection("lora", (*evidence, line), "guess", (f"if it was trained with LoRA-GA: {WAYS}",))
    return Detection("lora", evidence)


def _projections(modules: Modules, inputs: Inputs) -> Projections | None:
    """Return what the base's weights say, where there is a base; plain LoRA needs none of them but for this."""
    if inputs.base is None:
        return None
    try:
        return projections(modules, inputs.base)
    except InputError as err:
        if not any(map(inputs.base.is_quantized, modules)):
            raise
        raise err.advising(
            "give the base as it was before it was quantized; or --from lora, if its initialisation left it alone"
        ) from err


def _check_not_subtracted(source: Source, family: str, modules: Modules) -> None:
    half = halves(modules)
    if half and half.parallel:
        raise InputError(
            f"this adapter was converted already, and {family} would subtract the initial update again", code="GS-3201",
            file=source.weights, actual=str(half), expected="halves of A and B that have nothing in common",
            hint="--from lora, without --init-adapter and --mutated-base",
        )  # fmt: skip


def _check_part_of_base(source: Source, inputs: Inputs, family: str, modules: Modules) -> None:
    if inputs.base is None or (family == "olora" and any(map(inputs.base.is_transposed, modules))):
        return  # of Conv1D, PEFT's OLoRA takes the transpose
    found = projections(modules, inputs.base)
    if found and found.strange:
        raise BindingError(
            f"{family} begins with a part of the base's weights, and none of this base's is in the adapter",
            code="GS-440", file=inputs.base.folder, actual=str(found), expected="cosines near 1, above 0.5 in any case",
            hint=f"give the base that {source.folder.name} was trained on; --from lora if its base was not edited",
        )  # fmt: skip
