"""What an adapter folder says about itself: its adapter_config.json and the header of its safetensors file.

Nothing is judged here beyond "can it be read"; `preflight` finds the faults and `plan` uses the ranks. Tensor
names are those that PEFT writes, and no tensor data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gora_serve.adapter.names import parse_embedding_key, parse_key
from gora_serve.errors import InputError, MachineError
from gora_serve.integrity.canonical import read_json
from gora_serve.integrity.headers import TensorEntry, read_header
from gora_serve.integrity.layout import INDEX, SINGLE
from gora_serve.integrity.record import claim_of, read_record, trained_on

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_BYTES = 16 * 2**20
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class FactorPair:
    """The header entries of one module's A and B; None where the file has no such tensor."""

    A: TensorEntry | None = None
    B: TensorEntry | None = None


@dataclass(frozen=True)
class AdapterDir:
    """One adapter folder as read: the configuration, the factors by module path, and every other tensor
    name. `trained_on` is what an adapter of ours says of a quantized base that it was trained on, `claim` how it
    is bound to its base ("trained", "asserted"), None where nothing binds it.
    """

    name: str
    path: Path
    config: Mapping[str, object]
    pairs: Mapping[str, FactorPair] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    trained_on: Mapping[str, object] | None = None
    claim: str | None = None

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def weights_file(self) -> Path:
        return self.path / WEIGHTS_FILE


def require_adapter_files(path: Path) -> None:
    """Raise MachineError when the folder or one of its two files is missing, InputError where something else is there:
    a file instead of a folder (GS-3222), pickles instead of safetensors (GS-3221), a whole model (GS-3195).
    """
    if path.is_file():
        raise InputError(
            "an adapter is a folder, and this is a file; archives are not unpacked", code="GS-3222", file=path,
            expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}", hint="unpack it yourself, if you trust it",
        )  # fmt: skip
    pickles = unused_pickles(path)
    if pickles and not (path / WEIGHTS_FILE).exists():
        raise InputError(
            "this adapter has only pickles, which can run code and are not read", code="GS-3221",
            file=path / pickles[0], expected=WEIGHTS_FILE,
            hint="where you trust it: gora-serve convert --allow-pickle, which builds tensors alone",
        )  # fmt: skip
    model = next((path / name for name in (SINGLE, INDEX) if (path / name).is_file()), None)
    if model and not (path / CONFIG_FILE).exists():
        raise InputError(
            "this is a whole model, and no adapter", code="GS-3195", file=path, actual=model.name,
            expected=f"{CONFIG_FILE} and {WEIGHTS_FILE}",
            hint=f"if it is fine-tuned: gora-serve convert {path} --from full --base BASE --output DIR --rank R",
        )  # fmt: skip
    for needed in (path, path / CONFIG_FILE, path / WEIGHTS_FILE):
        if not needed.exists():
            hint = "check the path" if needed == path else "fetch, export or convert the adapter again, to safetensors"
            raise MachineError("no such adapter file or folder", code="GS-583", file=needed, hint=hint)


def unused_pickles(path: Path) -> list[str]:
    """Return the names of pickles with weights that lie beside the safetensors file. Nobody reads them."""
    return sorted(name for name in PICKLES if (path / name).exists())


def read_adapter_dir(name: str, path: Path) -> AdapterDir:
    """Read the configuration and the tensor header of one adapter; no tensor data."""
    require_adapter_files(path)
    config = _read_config(path / CONFIG_FILE)
    sides: dict[str, dict[str, TensorEntry]] = {}
    others: list[str] = []
    header = read_header(path / WEIGHTS_FILE)
    for tensor, entry in header.entries.items():
        parsed = parse_key(tensor) or parse_embedding_key(tensor)
        if parsed is None or parsed[1] in sides.get(parsed[0], {}):  # a second A: of an embedding, beside a layer's
            others.append(tensor)
            continue
        module, side = parsed
        sides.setdefault(module, {})[side] = entry
    pairs = {module: FactorPair(**found) for module, found in sides.items()}
    record = read_record(header.metadata, path / WEIGHTS_FILE)
    said = trained_on(record.get("origin", {}), path / WEIGHTS_FILE)
    return AdapterDir(name, path, config, pairs, tuple(sorted(others)), said, claim_of(record))


def _read_config(file: Path) -> Mapping[str, object]:
    config = read_json(file, limit=CONFIG_BYTES)
    if not isinstance(config, dict):
        raise InputError(
            "not a JSON object", code="GS-381", hint="fetch the adapter again", file=file, actual=type(config).__name__
        )
    return config
