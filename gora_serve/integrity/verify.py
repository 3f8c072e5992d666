"""The checks behind `verify`: an adapter folder against its own manifest and its base, a base against a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.errors import BindingError, InputError, MachineError, MismatchError
from gora_serve.integrity.binding import check_binding, check_folder
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.headers import read_header
from gora_serve.integrity.manifest import Manifest, Roots, differences, hash_adapter, hash_model
from gora_serve.integrity.record import WEIGHTS, bound_roots, read_record, trained_on
from gora_serve.progress import Listener, silent


@dataclass(frozen=True)
class Verified:
    """What was proved, by hashing every byte. `base` is None where no base was given to check against.

    trained_on: the quantized form of the base that the adapter says it was trained on, if it was.
    """

    path: Path
    root: str
    bound_to: Roots | None
    base: Path | None
    warnings: tuple[str, ...]
    trained_on: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `verify --json` prints."""
        return {
            "path": str(self.path),
            "verified": True,
            "level": "L2 full bytes",
            "root": self.root,
            "bound_to": self.bound_to.weights if self.bound_to else None,
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
) -> Verified:
    """Prove an exported adapter: its files, its tensors, and that it belongs to the base.

    base_manifest saves hashing a base again that was hashed just before. Raises MismatchError (exit 1) where bytes
    differ from the manifest, BindingError (exit 4) for another base, InputError where the folder has no manifest.
    """
    sealed = check_folder(folder)
    record, root = _checked_record(folder / WEIGHTS)
    for key, inside in (("adapter_root", root), ("binding", record.get("base"))):
        if sealed.get(key) != inside:
            raise MismatchError(
                f"gora_manifest.json and the weights file disagree on the {key}", code="GS-112", file=folder,
                expected=inside, actual=sealed.get(key), hint="export the adapter again",
            )  # fmt: skip
    warnings: tuple[str, ...] = ()
    if base is not None:
        warnings = _check_base(record, base_manifest or hash_model(base, listen=listen), base, strict=strict)
    said = trained_on(record.get("origin", {}), folder / WEIGHTS)
    return Verified(folder, root, bound_roots(record), base, warnings, said)


def verify_unsealed(folder: Path, *, base: Path, base_manifest: Manifest, strict: bool = False) -> Verified:
    """Check an adapter folder without gora_manifest.json as far as its weights file allows.

    One that gora-serve wrote still names its own root and its base in the file, and is held to both; for one of
    another tool there is a warning, or a BindingError where `strict` is set.
    """
    record, root = _checked_record(folder / WEIGHTS)
    missing = "no gora_manifest.json: its other files cannot be checked"
    warnings = _check_base(record, base_manifest, base, strict=strict)
    return Verified(folder, root, bound_roots(record), base, (missing, *warnings) if record else warnings)


def _checked_record(file: Path) -> tuple[dict[str, Any], str]:
    """Return the weights file's record and its root, hashed; the two must agree."""
    record = read_record(read_header(file).metadata, file)
    root, _ = hash_adapter(file)
    if record and record.get("adapter_root") != root:
        raise MismatchError(
            "the tensors are not those that the file names", code="GS-115", file=file,
            expected=record.get("adapter_root"), actual=root, hint="export the adapter again",
        )  # fmt: skip
    return record, root


def _check_base(record: Mapping[str, Any], manifest: Manifest, base: Path, *, strict: bool) -> tuple[str, ...]:
    bound = bound_roots(record)
    if bound is not None:
        return tuple(check_binding(bound, manifest, strict=strict, base=base))
    if strict:
        raise BindingError(
            "the adapter does not say which base it belongs to", code="GS-403", file=base,
            hint="leave --strict away to take it as it is",
        )  # fmt: skip
    return ("nothing says which base the adapter belongs to",)


def verify_base(folder: Path, manifest_file: Path, *, listen: Listener = silent) -> Verified:
    """Prove that a base is the one of a manifest that `hash` wrote. Raises MismatchError naming the first tensor."""
    expected = Manifest.from_json(read_json(manifest_file, limit=1 << 28), file=manifest_file)
    actual = hash_model(folder, listen=listen)
    changed = differences(expected.resolved(), actual.resolved())
    first = next(iter((*changed.changed, *changed.missing, *changed.extra)), None)
    if first is not None:
        count = sum(map(len, (changed.changed, changed.missing, changed.extra)))
        raise MismatchError(
            f"{count} tensors differ from the manifest", code="GS-113", file=folder, tensor=first,
            expected=expected.roots.weights, actual=actual.roots.weights,
            hint="restore the base, or hash it again if the change was meant",
        )  # fmt: skip
    _check_settings(folder, {"configuration": (expected.roots.config, actual.roots.config)})
    _check_settings(folder, {"tokenizer": (expected.roots.tokenizer, actual.roots.tokenizer)})
    return Verified(folder, actual.roots.weights, None, None, ())


def _check_settings(folder: Path, roots: Mapping[str, tuple[str | None, str | None]]) -> None:
    for name, (expected, actual) in roots.items():
        if expected != actual:
            raise MismatchError(
                f"the weights are those of the manifest, the {name} is not", code="GS-114", file=folder,
                expected=expected, actual=actual,
            )  # fmt: skip


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or (folder / WEIGHTS).is_file()


def find_adapter(path: Path) -> Path:
    """Return the adapter folder at `path`: the folder itself, or the adapter of a run folder."""
    if is_adapter(path):
        return path
    if is_adapter(path / "adapter"):
        return path / "adapter"
    if not path.is_dir():
        hint = "check the path; an adapter of the hub is given with its revision, org/name@main"
        raise MachineError("there is no such folder", code="GS-503", file=path, hint=hint)
    raise InputError(
        "neither an adapter nor a finished run", code="GS-346", file=path,
        hint="give what export or fit wrote; verify also takes a base with --manifest FILE or --against hub",
    )  # fmt: skip
