"""Seals and bindings: a folder that proves its own files, and an adapter that knows the base it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from gora_serve.errors import BindingError, InputError, MachineError, MismatchError, counted, listed
from gora_serve.integrity.cache import QuickCache
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.files import json_text, list_files, sha256_file, write_json
from gora_serve.integrity.known import known_tensors
from gora_serve.integrity.manifest import Differences, Manifest, Roots, TensorRecord, differences
from gora_serve.integrity.staging import SEAL
from gora_serve.integrity.targets import SEAL_LIMIT, SEAL_SCHEMA
from gora_serve.integrity.values import only_types_differ

SCHEMA = SEAL_SCHEMA
_AGAIN = "write the folder again with the command that made it, or fetch it again, whole"
OWN = "seal"  # the key of the digest of everything else in the file
_RESERVED = {"schema", "files", "status", OWN}


def seal_folder(
    folder: Path, record: Mapping[str, object], *, known: Mapping[str, tuple[int, str]] | None = None
) -> None:
    """Write `gora_manifest.json` into `folder`: size and SHA-256 of every other file, then the keys of `record`.

    known: of files that were hashed while they were written. To be called last: it is what makes the folder complete.
    """
    assert not _RESERVED & record.keys(), "record must not name keys of the seal"
    hashed = {name: (known or {}).get(name) or sha256_file(folder / name) for name in _files(folder)}
    files = {name: dict(zip(("size", "sha256"), one, strict=True)) for name, one in hashed.items()}
    value = {"schema": SCHEMA, "files": files, **record, "status": "complete"}
    write_json(folder / SEAL, with_digest(value))


def with_digest(value: Mapping[str, object]) -> dict[str, object]:
    """Return a seal with the digest of its own text, in the place of one that it may have."""
    return {**{key: one for key, one in value.items() if key != OWN}, OWN: digest_of_seal(value)}


def digest_of_seal(value: Mapping[str, object]) -> str:
    """Return what a seal says of itself: the SHA-256 of its own text without this key, in hexadecimal digits."""
    text = json_text({key: one for key, one in value.items() if key != OWN})
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    """Return the files below `folder`, without the seal and what a hub download adds."""
    return [
        name
        for name in list_files(folder)
        if name not in (SEAL, ".gitattributes") and not name.startswith(".cache/huggingface/")
    ]


def check_folder(folder: Path, *, cache: QuickCache | None = None) -> dict[str, object]:
    """Hash the files of a sealed folder again and return the whole content of its `gora_manifest.json`.

    With `cache`, files that it knows are not read again.
    Raises MismatchError (GS-102 a file differs, GS-103 is missing, GS-104 is extra) naming the first in that order and
    counting the others, and GS-116 where the manifest itself has changed; InputError (GS-330 schema, GS-332 no seal,
    GS-333 malformed or not complete).
    """
    if not folder.is_dir():
        raise MachineError("there is no such folder", code="GS-503", hint="check the path", file=folder)
    seal = folder / SEAL
    if not seal.exists():
        hint = (
            "an adapter of another tool: gora-serve convert makes a copy that can be verified and exported, gora-serve "
            "bind (plain LoRA) one that can be verified; one of gora-serve's own was not finished"
        )
        raise InputError(f"there is no {SEAL}", code="GS-332", file=folder, hint=hint)
    value = _read_seal(seal)
    files = value["files"]
    assert isinstance(files, dict)
    present = set(_files(folder))
    changed = [_fault(folder, name, files[name], cache) for name in sorted(files.keys() & present)]
    faults = [fault for fault in changed if fault is not None]
    faults += [("GS-103", name, "a file is missing", None, None) for name in sorted(files.keys() - present)]
    faults += [("GS-104", name, "a file is not in the manifest", None, None) for name in sorted(present - files.keys())]
    if faults:
        code, name, what, expected, actual = faults[0]
        more = f" (and {counted(len(faults) - 1, 'more difference')})" if len(faults) > 1 else ""
        raise MismatchError(
            what + more,
            code=code,
            hint=_AGAIN,
            file=folder / name,
            expected=expected,
            actual=actual,
        )
    _check_seal(seal, value)
    return value


def _check_seal(file: Path, value: Mapping[str, object]) -> None:
    """Hold a seal to its own digest, and to the text that is written of it: not a byte of it may be another."""
    expected, actual = value.get(OWN), digest_of_seal(value)
    if expected != actual or json_text(value).encode() != file.read_bytes():
        raise MismatchError(
            f"{SEAL} has changed itself", code="GS-116", hint=_AGAIN, file=file,
            expected=expected, actual=actual if expected != actual else "the same values in another text",
        )  # fmt: skip


Fault = tuple[str, str, str, str | None, str | None]  # code, file, what, expected, actual


def _fault(folder: Path, name: str, expected: Mapping[str, object], cache: QuickCache | None) -> Fault | None:
    path = folder / name
    if path.is_dir():
        return ("GS-102", name, "a file has become a folder", None, None)
    size, sha256 = sha256_file(path, cache)
    if size != expected["size"]:
        return ("GS-102", name, "a file has another size", f"{expected['size']} bytes", f"{size} bytes")
    if sha256 != expected["sha256"]:
        return ("GS-102", name, "a file has changed", str(expected["sha256"]), sha256)
    return None


def _read_seal(path: Path) -> dict[str, object]:
    value = read_json(path, limit=SEAL_LIMIT)
    if isinstance(value, dict) and value.get("schema", SCHEMA) != SCHEMA:
        what = "this manifest has a schema that this version does not read"
        raise InputError(
            what, code="GS-330", hint="update gora-serve", file=path, expected=SCHEMA, actual=value["schema"]
        )
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(files, dict) or "schema" not in value:
        raise InputError(
            "this manifest is malformed",
            code="GS-333",
            hint=_AGAIN,
            file=path,
            expected="schema, files, status",
        )
    if value.get("status") != "complete":
        raise InputError(
            "this folder is not complete",
            code="GS-333",
            hint=_AGAIN,
            file=path,
            actual=value.get("status"),
        )
    for name, record in files.items():
        if not _is_inside(name) or not isinstance(record, dict) or not {"size", "sha256"} <= record.keys():
            raise InputError(
                "this manifest is malformed",
                code="GS-333",
                hint=_AGAIN,
                file=path,
                actual=name,
            )
    return value


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


UNBOUND = "nothing proves which base the adapter belongs to"


def check_binding(
    bound: Roots,
    manifest: Manifest,
    *,
    strict: bool = False,
    base: Path,
    bound_name: str | None = None,
    adapter_tensors: Collection[str] = (),
) -> list[str]:
    """Compare the base that an adapter is bound to with the base at `base`; return the warnings to show.

    bound_name: what the adapter calls its base. adapter_tensors: the names of its tensors. Both serve the message.
    Raises BindingError: GS-401 where the weights differ, GS-402 where only configuration or tokenizer differ and
    `strict` is set. A root that one side lacks counts as different.
    """
    actual = manifest.roots
    if bound.weights != actual.weights:
        expected = known_tensors(bound.weights, bound_name)
        diff = differences(expected, manifest.tensors) if expected is not None else None
        residual = diff is not None and _looks_residual(diff, expected or {}, manifest.tensors, adapter_tensors)
        equal = expected is not None and only_types_differ(base, expected, manifest)
        why = EQUAL_VALUES if equal else RESIDUAL if residual else ""
        raise BindingError(
            f"this adapter belongs to a base with other weights: {which_differ(diff)}" + why,
            code="GS-401", file=base, expected=bound.weights, actual=actual.weights, hint=_WAY if residual else _OTHER,
        )  # fmt: skip
    pairs = [("configuration", bound.config, actual.config), ("tokenizer", bound.tokenizer, actual.tokenizer)]
    different = [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]
    if different and strict:
        _, ours, theirs = different[0]
        what = f"the weights match, but the base has another {' and '.join(name for name, _, _ in different)}"
        raise BindingError(
            what,
            code="GS-402",
            hint="use the very same files, or leave --strict out",
            file=base,
            expected=ours or "none",
            actual=theirs or "none",
        )
    return [f"the base has another {name} than the adapter was made for: {base}" for name, _, _ in different]


_OTHER = "use the base that the adapter was made for, or fit an adapter on this one"
_WAY = "gora-serve gap or convert, with the untouched base as --base and the edited one as --mutated-base"
EQUAL_VALUES = "; all values are equal, in another type: give the base as it was, in its own type"
RESIDUAL = (
    "; these are the adapter's own target modules and nothing else, so one of the two looks like a residual base"
    " (PiSSA, LoRA-GA)"
)


def which_differ(diff: Differences | None) -> str:
    """Say which tensors differ, the first by name; None: they cannot be known."""
    if diff is None:
        return "which tensors differ is not known here, as neither a manifest nor the folder of the other base is"
    kinds = (("changed", diff.changed), ("missing", diff.missing), ("extra", diff.extra))
    named = [f"{name} ({kind})" for kind, names in kinds for name in names]
    return listed(named)


def _looks_residual(
    diff: Differences,
    expected: Mapping[str, TensorRecord],
    actual: Mapping[str, TensorRecord],
    adapter_tensors: Collection[str],
) -> bool:
    """Return whether the bases differ in values of weights that the adapter adapts, and in nothing else.

    What PiSSA and LoRA-GA take out of a base lies there. The adapter's tensors carry the module's path, whatever they
    are called after it.
    """
    if diff.missing or diff.extra or not diff.changed:
        return False
    same_form = all(
        (expected[name].dtype, expected[name].shape) == (actual[name].dtype, actual[name].shape)
        for name in diff.changed
    )
    paths = [f".{name.removesuffix('.weight')}." for name in diff.changed]
    return same_form and all(any(path in f".{tensor}" for tensor in adapter_tensors) for path in paths)
