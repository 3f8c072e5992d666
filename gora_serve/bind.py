"""`bind`: a copy of a third-party LoRA adapter that says which base it belongs to, as a person asserts it.

The tensors stay as they are, byte for byte; only the header of their file gets a record, and the folder a seal. Whether
the assertion is true cannot be proved: refused is what cannot be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gora_serve
from gora_serve.adapter.names import parse_embedding_key
from gora_serve.errors import BindingError, InputError, UsageError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.canonical import canonical_json
from gora_serve.integrity.files import copy_file, sha256_file, staged_folder, write_stream
from gora_serve.integrity.finite import check_finite
from gora_serve.integrity.headers import encode_header, read_open_header
from gora_serve.integrity.known import hash_base
from gora_serve.integrity.layout import confined
from gora_serve.integrity.levels import Level
from gora_serve.integrity.manifest import Roots, hash_adapter
from gora_serve.integrity.reading import changed_while_reading, open_regular, pieces
from gora_serve.integrity.record import ASSERTED, RECORD_SCHEMA, WEIGHTS, binding_json, bound_roots, read_record
from gora_serve.integrity.space import require_space, size_of_files
from gora_serve.integrity.verify import check_bound
from gora_serve.progress import Listener, silent
from gora_serve.serving.adapter_dir import CONFIG_FILE, AdapterDir, read_adapter_dir
from gora_serve.serving.preflight import check_adapter, refuse
from gora_serve.serving.unserved import convert_command

if TYPE_CHECKING:
    from gora_serve.deploy.base import BaseWeights

# Beside configuration and weights: what explains an adapter, or belongs to its tokenizer. The rest stays behind.
_COPIED = re.compile(
    r"(?i)(readme|license|notice)(\.\w+)?|.*\.md"
    r"|(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template)\S*"
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Bound:
    """What was written: the adapter's root, the base that it is bound to, the files that were copied and left out."""

    folder: Path
    root: str
    base: Base
    roots: Roots
    modules: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `bind --json` prints."""
        return {
            "adapter": str(self.folder), "adapter_root": self.root, "base": self.base.name,
            "bound_to": self.roots.weights, "claim": ASSERTED, "level": Level.BYTES.value, "modules": self.modules,
            "copied": list(self.copied), "left_out": list(self.left_out),
        }  # fmt: skip


def bind(adapter: Path, base: str, output: Path, *, overwrite: bool = False, listen: Listener = silent) -> Bound:
    """Write a copy of the PEFT LoRA adapter in `adapter` into `output`, bound to `base` by assertion, and sealed.

    Raises InputError for a pickle (GS-337), NaN (GS-339) and what `preflight` finds; BindingError for shapes that the
    base does not have (GS-404, GS-462), for names that lack their first part (GS-463) and for an adapter that says that
    it belongs to another base (GS-401); UsageError (GS-271) for one that is bound to this base already; MachineError
    (GS-560) where the disk has no room.
    """
    located = locate_base(base)
    require_space(output, size_of_files(adapter))
    with staged_folder(output, overwrite=overwrite, protect=[adapter, located.path]) as stage:
        _refuse_pickles(adapter)
        read = read_adapter_dir("adapter", adapter)
        refuse(check_adapter(read))
        check_shapes(read, located.path)
        weights = confined(adapter, WEIGHTS)
        check_finite(weights)
        root, tensors = hash_adapter(weights)
        with open_regular(weights) as fd:
            record = read_record(read_open_header(fd, weights).metadata, weights)
        manifest = hash_base(located.path, listen=listen)
        already = bound_roots(record)
        if already is not None:
            check_bound(record, already, manifest, tensors.keys(), base=located.path)
            hint = "serve and verify take it as it is"
            raise UsageError("the adapter is bound to this base already", code="GS-271", file=weights, hint=hint)
        binding = binding_json(located.name, located.revision, manifest.roots, asserted=True)
        made = {
            "schema": RECORD_SCHEMA, "adapter_root": root, "base": binding, "origin": record.get("origin", {}),
            "tool": f"gora-serve {gora_serve.__version__}",
        }  # fmt: skip
        _write_weights(weights, stage / WEIGHTS, made)
        if hash_adapter(stage / WEIGHTS)[0] != root:
            raise changed_while_reading(weights)
        copied, left_out = _copy_files(adapter, stage)
        inputs = {name: sha256_file(confined(adapter, name))[1] for name in (CONFIG_FILE, WEIGHTS)}
        seal_folder(stage, {"adapter_root": root, "binding": binding, "inputs": inputs, "tool": made["tool"]})
    return Bound(output, root, located, manifest.roots, len(read.pairs), copied, left_out)


def _refuse_pickles(adapter: Path) -> None:
    if (adapter / WEIGHTS).exists() or not adapter.is_dir():
        return
    found = sorted(path.name for path in adapter.iterdir() if path.suffix in _PICKLES)
    if found:
        raise InputError(
            "this adapter has only pickles, which can run code and are not read", code="GS-337",
            file=adapter / found[0], expected=WEIGHTS,
            hint="where you trust it: gora-serve convert --allow-pickle, which writes safetensors",
        )  # fmt: skip


def check_shapes(adapter: AdapterDir, base: Path) -> None:
    """Raise BindingError where a module of the adapter is none of the base's (GS-404), has another shape (GS-462), or
    lacks the first part of its name (GS-463); or the base's own do (GS-453).

    The first is named, and how many there are.
    """
    from gora_serve.deploy.base import BaseWeights

    weights = BaseWeights(base)
    wrong = {path: shapes for path in adapter.pairs if (shapes := _shapes(adapter, weights, path))[0] != shapes[1]}
    if wrong:
        path, (expected, actual) = next(iter(wrong.items()))
        more = f" ({len(wrong)} of {len(adapter.pairs)} modules)" if len(wrong) > 1 else ""
        raise BindingError(
            f"the adapter does not fit this base{more}", code="GS-462", file=base, tensor=path,
            expected=f"(out, in) {expected}", actual=actual, hint="give the base that the adapter was trained on",
        )  # fmt: skip
    for path in adapter.pairs:
        name = weights.name_in_model(f"{path}.weight", adapter.config).removesuffix(".weight")
        if name != path:
            raise BindingError(
                "the adapter's names lack the first part of the base's: PEFT and engines would pass over its modules",
                code="GS-463", file=adapter.weights_file, tensor=path, expected=name,
                hint=convert_command(adapter.path, base),
            )  # fmt: skip


def _shapes(adapter: AdapterDir, weights: BaseWeights, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pair, expected = adapter.pairs[path], weights.shape(path)
    assert pair.A is not None
    assert pair.B is not None
    if parse_embedding_key(pair.A.name):  # PEFT's factors of an embedding make the transpose of its weight
        expected = (expected[1], expected[0])
    return expected, (pair.B.shape[0], pair.A.shape[1])


def _write_weights(source: Path, target: Path, record: Mapping[str, object]) -> None:
    """Write `source` with another header: the same tensors in the same order, and one more key of metadata."""
    with open_regular(source) as fd, write_stream(target) as stream:
        header = read_open_header(fd, source)
        layout = [(entry.name, entry.dtype, entry.shape) for entry in header.entries.values()]
        metadata = {**header.metadata, "gora_serve": canonical_json(record).decode()}
        stream.write(encode_header(layout, {"format": "pt", **metadata}))
        for piece in pieces(fd, header.data_start, header.file_size, path=source):
            stream.write(piece)


def _copy_files(adapter: Path, stage: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy what belongs to an adapter beside its weights; return the names that were copied and those that were not."""
    copied, left_out = [], []
    for entry in sorted(os.scandir(adapter), key=lambda entry: entry.name):
        if entry.name == WEIGHTS:
            continue
        wanted = entry.name == CONFIG_FILE or (
            _COPIED.fullmatch(entry.name) and Path(entry.name).suffix not in _PICKLES
        )
        if not wanted or not entry.is_file():
            left_out.append(entry.name)
            continue
        copy_file(confined(adapter, entry.name), stage / entry.name)
        copied.append(entry.name)
    return tuple(copied), tuple(left_out)
