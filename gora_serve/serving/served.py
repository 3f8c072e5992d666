"""What is served: an adapter, as read from its headers and configuration, and the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gora_serve.errors import InputError
from gora_serve.integrity.fingerprint import Expected
from gora_serve.integrity.manifest import Manifest
from gora_serve.serving.adapter_dir import AdapterDir, read_adapter_dir, require_adapter_files
from gora_serve.serving.adapter_names import check_name
from gora_serve.serving.preflight import Fault, as_fault, check_adapter, effective_scales, form_of, refuse


@dataclass(frozen=True)
class ServedAdapter:
    """A checked adapter: the name of its model, the largest rank of its tensors and its configuration (vLLM holds both
    against --max-lora-rank, also what r says where patterns replace it in every module), the paths of its modules,
    the quantized base that it says it was trained on, if it was, and how it is bound to its base, if it is.

    source: where it came from, where `path` is its entry in the store. scales: the smallest and the largest effective
    scale of its modules. canary: its fingerprint. root: of its tensors, once they were read. form: unit, native,
    uniform or plain. verify_seconds: what verifying and copying it took. ranks: of its modules' tensors.
    """

    name: str
    path: Path
    max_rank: int
    modules: tuple[str, ...]
    trained_on: Mapping[str, object] | None = None
    claim: str | None = None
    source: Path | None = None
    scales: tuple[float, float] | None = None
    canary: tuple[Expected, ...] = ()
    root: str | None = None
    form: str = "plain"
    verify_seconds: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedBase:
    """The base that is served: its folder, its manifest, its class, and what an adapter may call it."""

    path: Path
    manifest: Manifest
    architecture: str | None
    names: tuple[str, ...]


def read_served_adapters(named: Sequence[tuple[str, Path]], base: Path | None = None) -> tuple[ServedAdapter, ...]:
    """Read and check all adapters; the faults of all of them come in one InputError.

    `base` only names the base in the commands that are advised.
    """
    for name, path in named:
        check_name(name)
        require_adapter_files(path)
    read: list[AdapterDir] = []
    faults: list[Fault] = []
    for name, path in named:
        try:
            read.append(read_adapter_dir(name, path))
        except InputError as err:
            faults.append(as_fault(err, path))
    for adapter in read:
        faults += check_adapter(adapter, base)
    refuse(faults)
    return tuple(served(adapter) for adapter in read)


def served(adapter: AdapterDir) -> ServedAdapter:
    ranks = {module: pair.A.shape[0] for module, pair in adapter.pairs.items() if pair.A is not None}
    modules = tuple(sorted(adapter.pairs))
    scales, source = effective_scales(adapter).values(), adapter.path.resolve()
    pattern = adapter.config.get("rank_pattern")
    declared = (adapter.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ()))
    largest = max([*ranks.values(), *(rank for rank in declared if isinstance(rank, int))])
    return ServedAdapter(
        adapter.name, source, largest, modules, adapter.trained_on, adapter.claim, source,
        (min(scales), max(scales)) if scales else None, form=form_of(adapter), ranks=ranks,
    )  # fmt: skip
