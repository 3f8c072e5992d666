"""From adapters of any family to a merged model: read, planned, written tensor by tensor, measured, receipt.

The same for all families. Nothing is published where anything is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from converters.full import NOT_LINEAR
from converters.merge_receipt import MergedModel, Opened, make_receipt, merged_roots, said_of_nothing
from converters.read import held_to_base, read, refuse_another_base
from converters.reading import Inputs
from gora_serve.adapter.factors import LazyModules
from gora_serve.adapter.tensors import Both, Renamed
from gora_serve.config import BaseAs, MergeConfig
from gora_serve.deploy.base import EMBEDDINGS, BaseWeights
from gora_serve.deploy.beside import copy_beside
from gora_serve.deploy.combine_files import RECEIPT
from gora_serve.deploy.gap import Requantize, is_quantizable
from gora_serve.deploy.merge import write_model
from gora_serve.deploy.merge_plan import plan_merge
from gora_serve.deploy.merge_values import ModelPlan, Part
from gora_serve.deploy.replay import Replay, replay
from gora_serve.deploy.sum_of import FourBits
from gora_serve.deploy.trained_on import quantization
from gora_serve.errors import MachineError, MismatchError, listed
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import OWN, check_folder, digest_of_seal, seal_folder
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.digest import weights_root
from gora_serve.integrity.files import sha256_file, staged_folder, write_json
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import Manifest, Roots, check_index, hash_model
from gora_serve.integrity.reading import check_unchanged, stamps
from gora_serve.integrity.record import binding_json
from gora_serve.integrity.roots import config_root, tokenizer_names, tokenizer_root
from gora_serve.integrity.staging import SEAL, check_target
from gora_serve.integrity.targets import SEAL_LIMIT, check_is_unicode

_SHOWN = 5
Rounder = Callable[[], Requantize]  # makes what rounds to 4 bits, or raises MachineError


def open_adapters(adapters: Sequence[tuple[Path, float]], inputs: Inputs, family: str) -> list[Opened]:
    """Read adapters for a model. inputs: with the base. Raises what `read` does."""
    inputs = replace(inputs, merging=True)
    return [Opened(path, weight, *read(path, inputs, family)) for path, weight in adapters]


def _held(one: Opened, manifest: Callable[[], Manifest], base: Base, inputs: Inputs) -> tuple[str, ...]:
    return held_to_base(one.source, one.detection, one.reading, manifest, base, inputs)


def part_of(opened: Opened, base: BaseWeights) -> Part:
    """Return an adapter as the merge takes it."""
    source, reading = opened.source, opened.reading
    beyond = reading.beyond
    modules = beyond.before if beyond.magnitudes else reading.adapter.modules
    part = Part(
        opened.weight,
        modules,
        source.weights,
        magnitudes=Renamed(source.tensors, beyond.magnitudes),
        replaced=Both(Renamed(source.tensors, beyond.replaced), reading.adapter.carried),
        added={bias: source.tensors[name].double() * scale for bias, (name, scale) in beyond.added.items()},
        stacks=beyond.stacks,
        grounds=Renamed(source.tensors, beyond.grounds),
        task_type=reading.adapter.task_type,
        sizes=beyond.sizes,
        embeddings=reading.adapter.embeddings,
    )
    return _tied_too(part, base) if source.config.get("ensure_weight_tying") else part


def _tied_too(part: Part, base: BaseWeights) -> Part:
    """PEFT's ensure_weight_tying: the tied head gets the embeddings' update, also where the file does not repeat it."""
    head = base.head
    path = next((one for one in part.modules if one.rpartition(".")[2] in EMBEDDINGS), None)
    if path is not None and head not in part.modules and base.is_read_by_head(path):
        modules = part.modules
        both = LazyModules([*modules, head], lambda one: modules[path if one == head else one])
        return replace(part, modules=both)
    parameter = next((one for one in part.replaced if one.split(".")[-2] in EMBEDDINGS), None)
    if parameter is None or not base.is_read_by_head(parameter.removesuffix(".weight")):
        return part
    return replace(part, replaced=Both(part.replaced, {f"{head}.weight": part.replaced[parameter]}))


def merge_model(
    adapters: Sequence[tuple[Path, float]],
    base: Base,
    output: Path,
    config: MergeConfig | None = None,
    inputs: Inputs | None = None,
    *,
    rounder: Rounder | None = None,
    overwrite: bool = False,
) -> MergedModel:
    """Write `base` with the adapters merged into it as a model of the same shards into `output`, with a receipt.

    rounder: makes what rounds weights to NF4, for adapters that were trained on such a base. Raises what the readers,
    `check_index`, `plan_merge` and `write_model` raise, and BindingError (GS-401, GS-4352) for an adapter of
    another base.
    """
    config = config or MergeConfig()
    config.validate()
    check_is_unicode(output)
    check_index(base.path)
    weights = BaseWeights(base.path)
    inputs = replace(inputs or Inputs(), base=weights)
    protect = [base.path, *(path for path, _ in adapters), *inputs.beside]
    with staged_folder(output, overwrite=overwrite, protect=protect) as stage:
        opened = open_adapters(adapters, inputs, config.family)
        hashed = cache(lambda: hash_model(base.path))  # before the merge, only where two folders must be compared
        for one in opened:
            refuse_another_base(one.source, one.detection, one.reading, hashed, base)
        read_from = [file for one in opened for file in one.files]
        check_target(output, overwrite=overwrite, protect=read_from)
        before = stamps(read_from)
        four_bits, notes = _four_bits(opened, config, rounder)
        plan = plan_of(opened, weights, config, four_bits)
        written = write_model(stage, weights, plan, four_bits=four_bits, listen=inputs.listen)
        copied, left_out = copy_beside(base.path, stage, plan.config, _tokenizer(opened, weights, plan))
        roots = Roots(weights_root(written.base), config_root(base.path), tokenizer_root(base.path))
        manifest = Manifest(roots, written.base)
        warnings = [line for one in opened for line in _held(one, lambda: manifest, base, inputs)]
        warnings += said_of_nothing(written)
        check_unchanged(before)
        remember_manifest(manifest)
        done = MergedModel(
            output, base, roots, merged_roots(stage, written), tuple(opened), plan, written, config,
            copied, left_out, (*plan.notes, *notes), tuple(dict.fromkeys(warnings)),
        )  # fmt: skip
        done = replace(done, receipt=make_receipt(done))
        write_json(stage / RECEIPT, done.receipt)
        seal_folder(stage, _seal(done), known=written.files)
    return done


def plan_of(opened: Sequence[Opened], base: BaseWeights, config: MergeConfig, four_bits: FourBits | None) -> ModelPlan:
    """Return the plan of a merge. Raises what `plan_merge` does."""
    paths = [path for path in base.modules() if is_quantizable(path) and not NOT_LINEAR.search(path)]
    return plan_merge(
        base, [part_of(one, base) for one in opened], config.dtype, in_4_bits=paths if four_bits else ()
    )  # fmt: skip


def _four_bits(
    opened: Sequence[Opened], config: MergeConfig, rounder: Rounder | None
) -> tuple[FourBits | None, tuple[str, ...]]:
    """Return what compares with, or adds to, a base in 4 bits, where an adapter says or the user does that it was one.

    Only a single adapter with weight 1 has had a model in training that the merged one can be compared with. Raises
    MachineError (GS-530) where it was asked for and bitsandbytes is not installed.
    """
    said = [(one, found) for one in opened if (found := _lay_in(one)) is not None]
    if rounder is None or (config.base_as == "auto" and not said):
        return None, ()
    add_to, alone = config.base_as == "nf4", len(opened) == 1 and opened[0].weight == 1
    why = "--base-as says so" if not said else said[0][1]
    if len(opened) > 1 and said:
        why = "; ".join(f"{one.path}: {found}" for one, found in said)
    added = "to what NF4 makes of the weights" if add_to else "to the weights as stored"
    note = f"trained on a base in 4 bits ({why}); updates are added {added}"
    if not add_to and not alone:
        return None, (note,) if said else ()
    try:
        return FourBits(rounder(), add_to, alone), (note,)
    except MachineError as err:
        if config.base_as != "auto":
            raise
        return None, (f"trained on a base in 4 bits ({why}); what that means is not measured: {err.what}",)


def _lay_in(one: Opened) -> str | None:
    found = quantization(one.source.tensors.metadata, one.reading.adapter.base.name, one.source.weights)
    return found[1] if found else None


def _tokenizer(opened: Sequence[Opened], base: BaseWeights, plan: ModelPlan) -> Path | None:
    """Return the folder of the tokenizer of a vocabulary that an adapter has resized; None: the base's is kept."""
    resized = [one for one in plan.targets if one.source and one.shape != base.tensors.shape(one.source)]
    folders = [one.source.folder for one in opened if tokenizer_names(one.source.folder)]
    return folders[0] if resized and folders else None


def _seal(done: MergedModel) -> dict[str, Any]:
    binding = binding_json(done.base.name, done.base.revision, done.base_roots)
    roots = {"weights_root": done.roots.weights, "config_root": done.roots.config,
             "tokenizer_root": done.roots.tokenizer}  # fmt: skip
    return {**roots, "merged_on": binding, "tool": done.receipt["tool"]}


@dataclass(frozen=True)
class Checked:
    """A model held against the merge that it should be. sealed: whether it has a manifest, which its files fit.
    added_to: what the updates were added to in the replay."""

    folder: Path
    base: Base
    adapters: tuple[Opened, ...]
    replay: Replay
    sealed: bool
    warnings: tuple[str, ...]
    added_to: AddedTo


@dataclass(frozen=True)
class AddedTo:
    """What a replay adds the updates to, "bf16" (the weights as stored) or "nf4", and who says so."""

    base_as: BaseAs
    said_by: str
    warnings: tuple[str, ...] = ()


def verify_merged(
    folder: Path,
    adapters: Sequence[tuple[Path, float]],
    base: Base,
    family: str = MergeConfig.family,
    inputs: Inputs | None = None,
    *,
    base_as: BaseAs = MergeConfig.base_as,
    rounder: Rounder | None = None,
) -> Checked:
    """Make every tensor of the merge again, and hold it against the one in `folder`, whoever made that.

    base_as: what the updates are added to; "auto" is what merge.json says, where the folder's manifest proves that it
    is the one that `merge` wrote, and else the weights as stored. Raises MismatchError where the folder has a manifest
    that its files do not fit (after the tensors were compared, so that these are named), BindingError for an adapter of
    another base, and what reading adapters raises.
    """
    for model in (base.path, folder):
        check_index(model)
    weights = BaseWeights(base.path)
    inputs = replace(inputs or Inputs(), base=weights)
    opened = open_adapters(adapters, inputs, family)
    added = _added_to(folder, base_as)
    four_bits = _four_bits(opened, MergeConfig(family, base_as="nf4"), rounder)[0] if added.base_as == "nf4" else None
    plan = plan_of(opened, weights, MergeConfig(family), four_bits)
    theirs = BaseWeights(folder)
    found = replay(theirs, weights, plan, four_bits=four_bits, listen=inputs.listen)
    manifest = cache(lambda: hash_model(base.path, listen=inputs.listen))
    warnings = [*added.warnings, *(line for one in opened for line in _held(one, manifest, base, inputs))]
    sealed = (folder / SEAL).is_file()
    if sealed and found.verdict != "differs":
        _check_files(folder, theirs, found)
    return Checked(folder, base, tuple(opened), found, sealed, tuple(dict.fromkeys(warnings)), added)


def _check_files(folder: Path, theirs: BaseWeights, found: Replay) -> None:
    """Raise MismatchError where the files are not those of the manifest; with the tensors in the file that are not to
    the bit what the merge gives: rounding may explain them, but the manifest does not."""
    try:
        check_folder(folder)
    except MismatchError as err:
        file = Path(str(err.fields["file"]))
        near = [one for one in found.of("rounded") if _lies_in(theirs, one.name, file)]
        if not near:
            raise
        each = (f"{one.name}: {one.elements - one.equal} of {one.elements} elements" for one in near)
        named = listed(each, _SHOWN, between="; ")
        raise MismatchError(
            f"{err.what}; not bit-exact, but within rounding, in it: {named}", code=err.code, file=file,
            tensor=near[0].name, expected=err.fields.get("expected"), actual=err.fields.get("actual"),
            hint="merge again: gora-serve merge; or fetch the folder again, whole",
        ) from err  # fmt: skip


def _lies_in(model: BaseWeights, name: str, file: Path) -> bool:
    return name in model.tensors.files and model.tensors.files[name].resolve() == file.resolve()


def _added_to(folder: Path, asked: BaseAs) -> AddedTo:
    """Return what the updates were added to: as asked for, or as our own receipt says, where a manifest proves it.

    Other tools add to the weights as stored.
    """
    if asked != "auto":
        return AddedTo(asked, "--base-as")
    value = read_json(folder / RECEIPT) if (folder / RECEIPT).is_file() else {}
    settings = value.get("settings") if isinstance(value, dict) else None
    said = isinstance(settings, dict) and settings.get("base_as") == "nf4"
    if _is_sealed(folder, RECEIPT):
        return AddedTo("nf4" if said else "bf16", f"{RECEIPT}, which {SEAL} proves")
    warning = (
        f"{RECEIPT} says that the updates were added to NF4's weights, and no {SEAL} proves it: give --base-as nf4"
    )
    return AddedTo("bf16", "the default", (warning,) if said else ())


def _is_sealed(folder: Path, name: str) -> bool:
    """Tell whether a file is there and is the one of the folder's manifest, which is as it was written."""
    seal = read_json(folder / SEAL, limit=SEAL_LIMIT) if (folder / SEAL).is_file() and (folder / name).is_file() else {}
    files = seal.get("files") if isinstance(seal, dict) and seal.get(OWN) == digest_of_seal(seal) else None
    entry = files.get(name) if isinstance(files, dict) else None
    return isinstance(entry, dict) and entry.get("sha256") == sha256_file(folder / name)[1]
