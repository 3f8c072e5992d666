"""What `probe` and `fit` share: a base loaded on Accelerate's device, its targets, the data, and the base's proof."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import gora_serve
from gora_serve.config import DataConfig, ModelConfig, TrainConfig
from gora_serve.errors import MismatchError
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.integrity.known import hash_base
from gora_serve.integrity.layout import find_model
from gora_serve.integrity.manifest import Manifest, differences, hash_model
from gora_serve.progress import Listener
from gora_serve.training import inject
from gora_serve.training.data import Dataset, check_ids, collate, load_data
from gora_serve.training.encode import IGNORED, Example
from gora_serve.training.lengths import check_length
from gora_serve.training.models import check_causal, load_model, load_settings, load_tokenizer, vocabulary
from gora_serve.training.offload import offload
from gora_serve.training.out_of_memory import naming_memory
from gora_serve.training.processes import make_accelerator
from gora_serve.training.quantize import quantization_record
from gora_serve.training.sharding import check_sharding, shard, wants_sharding
from gora_serve.training.targets import find_targets, out_of_reach
from gora_serve.training.weights import is_conv1d, memory_root

log = logging.getLogger(__name__)

T = TypeVar("T")
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
            "roots": asdict(self.manifest.roots),
        }
        return record | ({"trained_on": dict(self.quantization)} if self.quantization else {})

    def load(self, source: str, rows: DataConfig) -> Dataset:
        """Read more rows as the session's own were read."""
        data = load_data(source, self.tokenizer, rows, encoder_decoder=self.encoder_decoder)
        check_ids(data, vocabulary(self.model), padding=self.tokenizer.pad_token_id)
        return data

    def batches(self, examples: Sequence[Example], indices: Sequence[Sequence[int]]) -> list[LazyBatch]:
        """Return this process's share of the micro-batches, each made when it is called, on the device."""
        return [partial(self._batch, [examples[i] for i in batch]) for batch in self._mine(indices)]

    def in_order(self, examples: Sequence[Example]) -> list[LazyBatch]:
        """Return this process's micro-batches of one pass over the examples, in file order.

        All processes get equally many, as a sharded base needs; where rows run out, one without loss fills up.
        """
        starts = range(0, len(examples), self.batch_size)
        whole: list[LazyBatch] = [partial(self._batch, examples[start : start + self.batch_size]) for start in starts]
        missing = -len(whole) % self.accelerator.num_processes
        return self._mine([*whole, *[partial(self._without_loss, examples[:1])] * missing])

    def _mine(self, batches: Sequence[T]) -> list[T]:
        return list(batches[self.accelerator.process_index :: self.accelerator.num_processes])

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = collate(examples, self.tokenizer.pad_token_id)
        if self.encoder_decoder:  # the model's own shift of the labels
            batch["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def _without_loss(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = self._batch(examples)  # with decoder inputs of real labels: mBART makes none of ignored ones
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


def peak_bytes(device: torch.device) -> dict[str, int | None]:
    """Return the most bytes so far: of this process on the host, of torch on its device (None on a CPU)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def versions() -> dict[str, str]:
    """Return the versions of gora-serve and of the packages that decide numbers."""
    return {"gora-serve": gora_serve.__version__} | {name: version(name) for name in PACKAGES}


@naming_memory()
def open_session(
    base: str, data: str, *, model: ModelConfig, rows: DataConfig, train: TrainConfig, listen: Listener
) -> Session:
    """Locate and hash the base, read the data, load the model onto the device. Raises before anything is written."""
    located = locate_base(base)
    files = find_model(located.path)
    settings = load_settings(located)
    tokenizer = load_tokenizer(located)
    dataset = load_data(data, tokenizer, rows, encoder_decoder=settings.is_encoder_decoder)
    manifest = hash_base(located.path, listen=listen)
    accelerator = make_accelerator(train)
    check_sharding(accelerator, model)
    torch.manual_seed(train.seed)
    loaded = load_model(located, model, device=accelerator.device)
    check_length(getattr(loaded.config, "max_position_embeddings", None), rows)
    check_ids(dataset, vocabulary(loaded), padding=tokenizer.pad_token_id)
    loaded = _place(loaded, model, train, accelerator)
    if not settings.is_encoder_decoder:
        check_causal(loaded, located, device=accelerator.device)
    modules = find_targets(loaded, model.targets)
    inject.check_targets(loaded, modules)
    if model.targets == "all-linear" and accelerator.is_main_process:
        _tell_what_is_left_out(loaded)
    memory = memory_root(loaded)
    quantization = quantization_record(loaded, modules, stored=files.weights, memory_root=memory)
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


def _place(model: nn.Module, config: ModelConfig, train: TrainConfig, accelerator: Any) -> nn.Module:
    """Put the weights where they stay: on the device, spread over the processes, or off the device."""
    if train.gradient_checkpointing and config.offload == "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.offload != "none":
        offload(model, config.offload, accelerator.device)
        return model
    if wants_sharding(accelerator):
        return shard(model, accelerator)
    on_device: nn.Module = model.to(accelerator.device)
    return on_device


def _tell_what_is_left_out(model: nn.Module) -> None:
    share, kinds = out_of_reach(model)
    if share >= 0.01:  # convolutions and the like are less
        log.warning(
            "%.0f %% of the base's parameters are matrices in modules that are no linear layers and get no adapter: %s",
            100 * share, ", ".join(kinds),
        )  # fmt: skip


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
    after = hash_model(session.base.path, listen=listen)
    if after.roots == session.manifest.roots:
        return {"roots": asdict(after.roots), "memory_root": check_memory(session, model)}
    changed = differences(session.manifest.tensors, after.tensors)
    first = next(iter((*changed.changed, *changed.missing, *changed.extra)), None)
    raise MismatchError(
        "the base's files changed during the run", code="GS-111", file=session.base.path, tensor=first,
        expected=session.manifest.roots.weights, actual=after.roots.weights, kept="no adapter was published",
        hint="another program wrote to the base; restore it and fit again",
    )  # fmt: skip
