"""What `export`, `hash`, `verify` and `bind` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gora_serve.cli.render import Summary
from gora_serve.errors import counted
from gora_serve.integrity.levels import Level
from gora_serve.integrity.record import ASSERTED, trained_on_text

if TYPE_CHECKING:
    from gora_serve.adapter.factors import Adapter
    from gora_serve.bind import Bound
    from gora_serve.config import Form
    from gora_serve.integrity.bases import Base
    from gora_serve.integrity.manifest import Manifest
    from gora_serve.integrity.verify import Verified
    from gora_serve.training.export import Exported

UNVERIFIED = ": digests of files that stand as they stood when they were hashed; not verified"


def export_summary(done: Exported, form: Form, dtype: str) -> Summary:
    """An export: where it is, its root, ranks and parameters."""
    from gora_serve.adapter.format import written_parameters

    adapter: Adapter = done.adapter
    ranks = list(adapter.ranks.values())
    written = written_parameters(adapter, form)
    zeros = f" ({written:,} in the file, with the zeros of the padding)" if written > adapter.parameters else ""
    value = {
        "adapter": str(done.folder), "adapter_root": done.root, "form": form, "dtype": dtype,
        "modules": len(ranks), "parameters": adapter.parameters, "written_parameters": written,
        "max_rank": max(ranks), "canary": done.canary,
    }  # fmt: skip
    lines = [
        f"wrote {done.folder}",
        f"{counted(len(ranks), 'module')}, ranks {min(ranks)} to {max(ranks)}, {adapter.parameters:,} parameters"
        f"{zeros}, form {form}",
        f"adapter root {done.root}",
        f"fingerprint of its answers: {done.canary}",
    ]
    if done.gguf:
        value["gguf"] = asdict(done.gguf)
        lines.append(f"{done.gguf.file} for llama.cpp ({done.gguf.architecture}), error {done.gguf.error:.1e}")
    return Summary(value, lines)


def hash_summary(base: Base, manifest: Manifest, outputs: Sequence[Path], level: Level) -> Summary:
    """The roots of a base; as JSON, the whole manifest."""
    roots = manifest.roots
    size = sum(record.nbytes for record in manifest.tensors.values())
    lines = [
        f"weights   {roots.weights}",
        f"config    {roots.config or 'no config.json'}",
        f"tokenizer {roots.tokenizer or 'no tokenizer'}",
        f"{counted(len(manifest.tensors), 'tensor')}, {size:,} bytes",
    ]
    lines += [f"{base.name} at commit {base.revision}"] if base.revision else []
    lines.append(f"level {level.value}" + ("" if level.verifies else UNVERIFIED))
    lines += [f"wrote {output}" for output in outputs]
    return Summary({"base": str(base.path), "level": level.value, **manifest.to_json()}, lines)


def verify_summary(done: Verified) -> Summary:
    """What was proved: how deep it was looked, the root, and the base that it belongs to."""
    said = f"verified {done.path}: every byte hashed" if done.level.verifies else f"unchanged {done.path}"
    lines = [f"{said} ({done.level.value}{'' if done.level.verifies else UNVERIFIED})", f"root {done.root}"]
    if done.base and not done.warnings:
        lines.append(f"belongs to {done.base}" + (" (asserted, not trained)" if done.claim == ASSERTED else ""))
    elif not done.base and done.bound_to:
        how = f"bound to base {done.bound_to.weights} ({done.claim}), which was not checked: give --base"
        made = f"merged on base {done.bound_to.weights}, which was not checked: give --base BASE -a ADAPTER"
        lines.append(how if done.claim else made)
    lines += [trained_on_text(done.trained_on)] if done.trained_on else []
    return Summary(done.to_json(), lines + [f"warning: {warning}" for warning in done.warnings])


def bind_summary(done: Bound) -> Summary:
    """A binding that a person asserted: what was written, what was left behind."""
    lines = [
        f"wrote {done.folder}",
        f"{counted(done.modules, 'module')}, asserted to belong to {done.base.name}: {done.roots.weights}",
        f"adapter root {done.root}",
    ]
    lines += [f"left out: {', '.join(done.left_out)}"] if done.left_out else []
    return Summary(done.to_json(), lines)
