"""The checks behind `verify`: an adapter folder against its own manifest and its base, a base against a manifest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.errors import BindingError, InputError, MachineError, MismatchError, counted
from gora_serve.integrity.binding import UNBOUND, check_binding, check_folder, which_differ
from gora_serve.integrity.cache import QuickCache
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.digest import CHUNK
from gora_serve.integrity.files import sha256_file
from gora_serve.integrity.finite import check_finite
from gora_serve.integrity.headers import read_header
from gora_serve.integrity.layout import INDEX, find_model, other_weights
from gora_serve.integrity.levels import Level
from gora_serve.integrity.manifest import Differences, Manifest, Roots, differences, hash_adapter, hash_model
from gora_serve.integrity.record import WEIGHTS, bound_roots, claim_of, read_record, trained_on
from gora_serve.integrity.staging import SEAL
from gora_serve.integrity.values import only_types_differ
from gora_serve.progress import Listener, silent


@dataclass(frozen=True)
class Verified:
    """What was proved, and at which level. `base` is None where no base was given to check against.

    trained_on: the quantized form of the base that the adapter says it was trained on, if it was. claim: "trained" or
    "asserted" (by `bind`) for an adapter that is bound. level: L0 where digests came from the cache. canary: what the
    seal has of the answers that the adapter gives over its base, if it has any.
    """

    path: Path
    root: str
    bound_to: Roots | None
    base: Path | None
    warnings: tuple[str, ...]
    trained_on: Mapping[str, Any] | None = None
    claim: str | None = None
    level: Level = Level.BYTES
    canary: object = None

    def to_json(self) -> dict[str, Any]:
        """Return what `verify --json` prints."""
        return {
            "path": str(self.path),
            "verified": self.level.verifies,
            "level": self.level.value,
            "root": self.root,
            "bound_to": self.bound_to.weights if self.bound_to else None,
            "claim": self.claim,
            "base": str(self.base) if self.base else None,
            "trained_on": dict(self.trained_on) if self.trained_on else None,
            "warnings": list(self.warnings),
        }


def verify_adapter(
    folder: Path,
    *,
    base: Path | None = None,
    base_manifest: Manifest | None = None,
    strict: bool = False,
    listen: Listener = silent,
    cache: QuickCache | None = None,
) -> Verified:
    """Prove an exported adapter: its files, its tensors, and that it belongs to the base.

    base_manifest saves hashing a base again that was hashed just before; `cache`, reading files that it knows. Raises
    MismatchError (exit 1) where bytes differ from the manifest, BindingError (exit 4) for another base, InputError
    where the folder has no manifest.
    """
    sealed = check_folder(folder, cache=cache)
    record, root, names = _checked_record(folder / WEIGHTS, cache)
    for key, inside in (("adapter_root", root), ("binding", record.get("base"))):
        if sealed.get(key) != inside:
            raise MismatchError(
                f"gora_manifest.json and the weights file disagree on the {key}", code="GS-112", file=folder,
                expected=inside, actual=sealed.get(key), hint="export the adapter again",
            )  # fmt: skip
    warnings: tuple[str, ...] = ()
    if base is not None:
        manifest = base_manifest or hash_model(base, listen=listen, cache=cache)
        warnings = _check_base(record, names, manifest, base, adapter=folder, strict=strict)
    said = trained_on(record.get("origin", {}), folder / WEIGHTS)
    level = cache.level if cache else Level.BYTES
    return Verified(
        folder, root, bound_roots(record), base, warnings, said, claim_of(record), level, sealed.get("canary")
    )


def verify_unsealed(folder: Path, *, base: Path, base_manifest: Manifest, strict: bool = False) -> Verified:
    """Check an adapter folder without gora_manifest.json as far as its weights file allows.

    One that gora-serve wrote still names its own root and its base in the file, and is held to both; for one of
    another tool there is a warning, or a BindingError where `strict` is set.
    """
    record, root, names = _checked_record(folder / WEIGHTS)
    missing = "no gora_manifest.json: its other files cannot be checked"
    warnings = _check_base(record, names, base_manifest, base, adapter=folder, strict=strict)
    told = (missing, *warnings) if record else warnings
    return Verified(folder, root, bound_roots(record), base, told, claim=claim_of(record))


def _checked_record(file: Path, cache: QuickCache | None = None) -> tuple[dict[str, Any], str, Collection[str]]:
    """Return the weights file's record, its root, hashed, and its tensors' names.

    Record and root must agree, and every value must be finite; with a cache the values are not looked at.
    """
    record = read_record(read_header(file).metadata, file)
    root, tensors = hash_adapter(file, cache=cache)
    if record and record.get("adapter_root") != root:
        raise MismatchError(
            "the tensors are not those that the file names", code="GS-115", file=file,
            expected=record.get("adapter_root"), actual=root, hint="export the adapter again",
        )  # fmt: skip
    if cache is None:
        check_finite(file)
    return record, root, tensors.keys()


def _check_base(
    record: Mapping[str, Any], names: Collection[str], manifest: Manifest, base: Path, *, adapter: Path, strict: bool
) -> tuple[str, ...]:
    bound = bound_roots(record)
    if bound is not None:
        return tuple(check_bound(record, bound, manifest, names, strict=strict, base=base))
    if strict:
        raise BindingError(
            "the adapter does not say which base it belongs to", code="GS-403", file=adapter,
            hint="leave --strict away to take it as it is",
        )  # fmt: skip
    return (UNBOUND,)


def check_bound(
    record: Mapping[str, Any],
    bound: Roots,
    manifest: Manifest,
    adapter_tensors: Collection[str],
    *,
    strict: bool = False,
    base: Path,
) -> list[str]:
    """Hold an adapter to the base that its record names, as `check_binding` does."""
    name = record["base"].get("repo_id")
    named = name if isinstance(name, str) else None
    return check_binding(bound, manifest, strict=strict, base=base, bound_name=named, adapter_tensors=adapter_tensors)


def verify_base(
    folder: Path, manifest_file: Path, *, listen: Listener = silent, cache: QuickCache | None = None
) -> Verified:
    """Prove that a base is the one of a manifest that `hash` wrote. Raises MismatchError naming the first tensor."""
    expected = Manifest.from_json(read_json(manifest_file, limit=1 << 28), file=manifest_file)
    actual = hash_model(folder, listen=listen, cache=cache)
    changed = differences(expected.resolved(), actual.resolved())
    if changed and expected.roots.weights != actual.roots.weights:  # else what ties them differs: the configuration
        raise _other_tensors(folder, expected, actual, changed)
    _check_settings(folder, expected, "configuration", expected.roots.config, actual.roots.config)
    _check_settings(folder, expected, "tokenizer", expected.roots.tokenizer, actual.roots.tokenizer)
    warnings = other_files(folder)
    if expected.roots.weights != actual.roots.weights:  # only tied weights make that possible
        warnings.append(
            "the same weights, but a tied head is stored in one of the two: by its root this is another base, and "
            f"adapters are bound to roots (the manifest has {expected.roots.weights})"
        )
    level = cache.level if cache else Level.BYTES
    return Verified(folder, actual.roots.weights, None, None, tuple(warnings), level=level)


def other_files(folder: Path) -> list[str]:
    """Return a warning where the folder of a model holds more weight files than the model's."""
    others = other_weights(folder)
    return [f"{folder}: no part of the model, and not hashed: {', '.join(others)}"] if others else []


def _other_tensors(folder: Path, expected: Manifest, actual: Manifest, changed: Differences) -> MismatchError:
    """Return GS-150 where all values are equal and only types differ, else GS-113; both name the first tensor."""
    names = _stored_first(expected, actual, changed)
    first, ours, theirs = names[0], expected.roots.weights, actual.roots.weights
    if only_types_differ(folder, expected.resolved(), actual):
        was, now = expected.resolved()[first].dtype, actual.resolved()[first].dtype
        have = counted(len(names), "tensor has", "tensors have")
        return MismatchError(
            f"all values are equal to the manifest's, but {have} another type: {now}, not {was}",
            code="GS-150", file=_holder(folder, first), tensor=first, expected=ours, actual=theirs,
            hint="use the base as it was, or hash this one anew; adapters are bound to bytes, not to values",
        )  # fmt: skip
    differ = counted(len(names), "tensor differs", "tensors differ")
    return MismatchError(
        f"{differ} from the manifest: {which_differ(only(changed, names))}"
        f"{damaged_chunk(expected, actual, first)}", code="GS-113",
        file=_holder(folder, first), tensor=first, expected=ours, actual=theirs,
        hint="restore the base, or hash it again if the change was meant",
    )  # fmt: skip


def _stored_first(expected: Manifest, actual: Manifest, changed: Differences) -> list[str]:
    """Return the names that differ, without those that lie in no file of the folder and are tied to another of them."""
    names = [*changed.changed, *changed.missing, *changed.extra]
    ties = {**expected.aliases, **actual.aliases}
    kept = [name for name in names if name in actual.tensors or ties.get(name) not in names]
    return kept or names  # a manifest that was edited may tie them in a ring


def only(diff: Differences, names: Collection[str]) -> Differences:
    """Return the differences in these tensors alone."""
    kept = [tuple(name for name in kind if name in names) for kind in (diff.changed, diff.missing, diff.extra)]
    return Differences(*kept)


def damaged_chunk(expected: Manifest, actual: Manifest, name: str) -> str:
    """Say in which 4 MiB of a tensor the first damage lies, where both manifests have its leaves."""
    ours, theirs = expected.leaves.get(name, ()), actual.leaves.get(name, ())
    if not ours or len(ours) != len(theirs):
        return ""
    chunk = next((index for index, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), None)
    if chunk is None:
        return ""
    end = min((chunk + 1) * CHUNK, expected.tensors[name].nbytes)
    return f"; the first from chunk {chunk + 1} of {len(ours)} on: bytes {chunk * CHUNK} to {end - 1} of the tensor"


def _holder(folder: Path, tensor: str) -> Path:
    """Return the weight file that holds the tensor, or the folder where none does."""
    files = find_model(folder).weights.values()
    return next((path for path in files if tensor in read_header(path).entries), folder)


def _check_settings(folder: Path, manifest: Manifest, name: str, expected: str | None, actual: str | None) -> None:
    if expected != actual:
        raise MismatchError(
            f"the weights are those of the manifest, the {name} is not", code="GS-114",
            file=_changed_file(folder, manifest, config=name == "configuration"), expected=expected or "none",
            actual=actual or "none", hint="restore the files, or hash the base again",
        )  # fmt: skip


def _changed_file(folder: Path, manifest: Manifest, *, config: bool) -> Path:
    """Return the first of the small files that is not the manifest's, or the folder where it cannot be told."""
    weights = (".safetensors", INDEX)
    for record in manifest.files:
        if record.path.endswith(weights) or (record.path == "config.json") != config:
            continue
        path = folder / record.path
        if not path.is_file() or sha256_file(path)[1] != record.sha256:
            return path
    return folder


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or (folder / WEIGHTS).is_file()


def is_merged_model(folder: Path) -> bool:
    """Tell whether a folder is a model that `merge` has written."""
    return (folder / SEAL).is_file() and (folder / "config.json").is_file() and not is_adapter(folder)


def verify_model(folder: Path, *, cache: QuickCache | None = None) -> Verified:
    """Prove the files of a merged model by its own manifest; not what it was made of, which takes base and adapters."""
    sealed = check_folder(folder, cache=cache)
    made_on = {"base": sealed["merged_on"]} if isinstance(sealed.get("merged_on"), dict) else {}
    level = cache.level if cache else Level.BYTES
    return Verified(folder, str(sealed.get("weights_root")), bound_roots(made_on), None, (), level=level)


def adapter_of_run(path: Path) -> Path:
    """Return the adapter of a finished run, and any other path as it is."""
    return path / "adapter" if (path / "run.json").is_file() and is_adapter(path / "adapter") else path


def find_adapter(path: Path) -> Path:
    """Return the adapter folder at `path`: the folder itself, or the adapter of a run folder."""
    if is_adapter(path):
        return path
    if is_adapter(path / "adapter"):
        return path / "adapter"
    if not path.is_dir():
        hint = "check the path; an adapter of the hub is given with its revision, org/name@main"
        if path.suffix == ".partial" and path.with_suffix("").is_dir():
            hint = f"this one is finished: {path.with_suffix('')}"
        raise MachineError("there is no such folder", code="GS-503", file=path, hint=hint)
    hint = "give a run folder of fit, or an adapter that export, convert or bind wrote"
    if (path / "config.json").is_file():
        hint = (
            "this is a model: export takes a run folder of fit; verify takes a base with --manifest FILE or --against "
            "hub, and a merged model with --base BASE -a ADAPTER"
        )
    elif (path / "run.json").is_file():
        hint = "its adapter comes when the run is finished: fit with --resume goes on with it"
    raise InputError("neither an adapter nor a finished run", code="GS-346", file=path, hint=hint)
