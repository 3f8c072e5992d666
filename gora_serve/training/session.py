"""What `probe` and `fit` share: a base loaded on Accelerate's device, its targets, the data, and the base's proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import gora_serve
from gora_serve.config import DataConfig, ModelConfig, TrainConfig
from gora_serve.errors import MachineError, MismatchError, UsageError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.manifest import Manifest, Roots, differences, hash_model
from gora_serve.progress import Listener
from gora_serve.training.data import Dataset, collate, load_data
from gora_serve.training.encode import Example
from gora_serve.training.models import load_model, load_settings, load_tokenizer
from gora_serve.training.quantize import quantization_record
from gora_serve.training.targets import find_targets
from gora_serve.training.weights import is_conv1d, memory_root

LazyBatch = Callable[[], Mapping[str, Tensor]]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets")


@dataclass(frozen=True)
class Session:
    """A base, ready to be probed and trained, with its digests from before.

    quantization: what is recorded of a base in 4 bits (training/quantize.py); None for one that is not.
    """

    base: Base
    model: nn.Module
    tokenizer: Any
    modules: Mapping[str, nn.Module]
    data: Dataset
    accelerator: Any
    manifest: Manifest
    memory: str
    batch_size: int
    seed: int
    quantization: Mapping[str, Any] | None = None

    @property
    def fan_in_fan_out(self) -> bool:
        return any(is_conv1d(module) for module in self.modules.values())

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)  # type: ignore[union-attr]

    @property
    def task_type(self) -> str:
        """PEFT's word for the kind of model."""
        return "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"

    @property
    def base_record(self) -> dict[str, Any]:
        """What probe.json and run.json say of the base."""
        record = {
            "name": self.base.name,
            "revision": self.base.revision,
            "roots": roots_json(self.manifest.roots),
        }
        return record | ({"trained_on": dict(self.quantization)} if self.quantization else {})

    def load(self, source: str, rows: DataConfig) -> Dataset:
        """Read more rows as the session's own were read."""
        return load_data(source, self.tokenizer, rows, encoder_decoder=self.encoder_decoder)

    def batches(self, examples: Sequence[Example], indices: Sequence[Sequence[int]]) -> list[LazyBatch]:
        """Return this process's share of the micro-batches, each made when it is called, on the device."""
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        return [partial(self._batch, [examples[i] for i in batch]) for batch in mine]

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate(examples, self.tokenizer.pad_token_id)
        if self.encoder_decoder:  # the model's own shift of the labels
            batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def in_order(self, examples: Sequence[Example]) -> list[LazyBatch]:
        """Return this process's micro-batches of one pass over the examples, in file order."""
        places = range(len(examples))
        size = self.batch_size
        return self.batches(examples, [places[start : start + size] for start in places[::size]])


def roots_json(roots: Roots) -> dict[str, str | None]:
    return {"weights": roots.weights, "config": roots.config, "tokenizer": roots.tokenizer}


def versions() -> dict[str, str]:
    """Return the versions of gora-serve and of the packages that decide numbers."""
    return {"gora-serve": gora_serve.__version__} | {name: version(name) for name in PACKAGES}


def open_session(
    base: str, data: str, *, model: ModelConfig, rows: DataConfig, train: TrainConfig, listen: Listener
) -> Session:
    """Locate and hash the base, read the data, load the model onto the device. Raises before anything is written."""
    located = locate_base(base)
    files = find_model(located.path)
    settings = load_settings(located)
    tokenizer = load_tokenizer(located)
    dataset = load_data(data, tokenizer, rows, encoder_decoder=settings.is_encoder_decoder)
    manifest = hash_model(located.path, listen=listen)
    accelerator = _make_accelerator(train)
    torch.manual_seed(train.seed)
    loaded = load_model(located, model, device=accelerator.device)
    modules = find_targets(loaded, model.targets)
    _check_length(loaded, rows)
    memory = memory_root(loaded)
    quantization = quantization_record(loaded, modules, stored=files.weights, memory_root=memory)
    if train.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    loaded.to(accelerator.device)
    return Session(
        located,
        loaded,
        tokenizer,
        modules,
        dataset,
        accelerator,
        manifest,
        memory,
        rows.batch_size,
        train.seed,
        quantization,
    )


def _make_accelerator(train: TrainConfig) -> Any:
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision=train.mixed_precision)
    except ValueError as err:
        raise UsageError("Accelerate refuses these settings", code="GS-204", actual=str(err)) from err
    accelerator.gradient_accumulation_steps = train.grad_accum  # the environment would win over the constructor
    return accelerator


def _check_length(model: nn.Module, rows: DataConfig) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and rows.max_length > limit:
        raise UsageError(
            "--max-length is more than the base has positions", code="GS-205", expected=f"at most {limit}",
            actual=rows.max_length,
        )  # fmt: skip


@contextmanager
def naming_memory() -> Iterator[None]:
    """Turn a device that ran out of memory into an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise MachineError(
            "the device ran out of memory", code="GS-526", actual=str(err).splitlines()[0],
            hint="a smaller --batch-size or --max-length, or --gradient-checkpointing",
        ) from err  # fmt: skip


def sum_over_processes(tensor: Tensor, accelerator: Any) -> Tensor:
    """Return the sum over processes, on the tensor's own device and in its dtype."""
    if accelerator.num_processes == 1:
        return tensor
    summed: Tensor = accelerator.reduce(tensor.to(accelerator.device), "sum")
    return summed.to(tensor.device)


def check_memory(session: Session, model: nn.Module) -> str:
    """Return the digest of the base's weights in memory. Raises MismatchError if it is not what it was."""
    memory = memory_root(model)
    if memory != session.memory:
        raise MismatchError(
            "the base's weights in memory changed during the run", code="GS-110", file=session.base.path,
            expected=session.memory, actual=memory, kept="no adapter was published",
            hint="some code wrote to a frozen weight; report it with the run's run.json",
        )  # fmt: skip
    return memory


def check_untouched(session: Session, model: nn.Module, *, listen: Listener) -> dict[str, Any]:
    """Prove that the base is what it was: its files, and its weights in memory without LoRA layers.

    Returns the digests of afterwards, for run.json. Raises MismatchError (exit 1) naming the first tensor whose
    bytes changed.
    """
    memory = check_memory(session, model)
    after = hash_model(session.base.path, listen=listen)
    if after.roots == session.manifest.roots:
        return {"roots": roots_json(after.roots), "memory_root": memory}
    changed = differences(session.manifest.tensors, after.tensors)
    first = next(iter((*changed.changed, *changed.missing, *changed.extra)), None)
    raise MismatchError(
        "the base's files changed during the run", code="GS-111", file=session.base.path, tensor=first,
        expected=session.manifest.roots.weights, actual=after.roots.weights, kept="no adapter was published",
        hint="another program wrote to the base; restore it and fit again",
    )  # fmt: skip
