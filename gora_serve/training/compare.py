"""What the gap does to answers: loss, divergence and agreement of several models that differ in some weights alone.

The base is loaded once. Each model is its files' weights plus an update, put in module by module; the arithmetic is
float32 for all of them, so that what differs is the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gora_serve.adapter.factors import LoraFactors
from gora_serve.config import DataConfig, ModelConfig
from gora_serve.deploy.gap import Parts, stored_update
from gora_serve.errors import InputError
from gora_serve.integrity.bases import Base
from gora_serve.progress import Listener, Progress, silent
from gora_serve.training.data import check_ids, collate, load_data
from gora_serve.training.encode import Example
from gora_serve.training.lengths import check_length
from gora_serve.training.loss import Batch, scored
from gora_serve.training.models import load_model, load_settings, load_tokenizer, vocabulary
from gora_serve.training.out_of_memory import naming_memory
from gora_serve.training.targets import linear_modules
from gora_serve.training.weights import is_transposed

AS_TRAINED, UNCONVERTED, CONVERTED, BASE = "as trained", "served unconverted", "converted", "the base itself"
KEPT = 2**28  # log-probabilities of the trained model that are kept at a time: 1 GiB


@dataclass(frozen=True)
class Variant:
    """A model: the weight of each module, (out, in), and the parameters that an adapter replaces whole."""

    weight: Callable[[str], Tensor]
    saved: Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """loss: mean per token with loss, in nats. kl: mean over them of KL(as trained || this model), in nats.
    agreement: the share of them with the same likeliest token as the trained model."""

    loss: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Comparison:
    """The models' outcomes by name, the trained one first, and what they were asked."""

    outcomes: Mapping[str, Outcome]
    data: Mapping[str, Any]
    rows: int
    tokens: int


def variants_of(parts: Parts, saved: Mapping[str, Tensor], dtype: torch.dtype, tolerance: float) -> dict[str, Variant]:
    """Return the models to compare: as trained, served unconverted (where an engine loads it), converted (where the
    update has low rank), the base.

    saved: the parameters that the adapter carries whole (modules_to_save). dtype and tolerance: of the conversion.
    """

    def plus(weight: Tensor, *updates: LoraFactors | None) -> Tensor:
        total = weight.double()  # (out, in)
        for update in updates:
            total = total if update is None else total + update.delta()
        return total.float()

    def trained(path: str) -> Tensor:  # the factors as trained are dW + P0
        exact, _, initial = parts.of(path)
        return plus(parts.trained_on(path, parts.base.weight(path)), exact, initial)

    def unconverted(path: str) -> Tensor:
        _, served, _ = parts.of(path)
        return plus(parts.base.weight(path), served)

    def converted(path: str) -> Tensor:
        exact, *_ = parts.of(path)
        return plus(parts.base.weight(path), stored_update(exact, dtype, tolerance) if exact else None)

    found = {AS_TRAINED: Variant(trained, saved)}
    if parts.served is not None:
        found[UNCONVERTED] = Variant(unconverted, saved)
    if not parts.full_rank:
        found[CONVERTED] = Variant(converted, saved)
    return found | {BASE: Variant(parts.base.weight, {})}


def compare(
    base: Base,
    data: str,
    parts: Parts,
    variants: Mapping[str, Variant],
    *,
    rows: DataConfig,
    max_rows: int,
    listen: Listener = silent,
) -> Comparison:
    """Ask every model the first `max_rows` rows of the data. The first variant is what the others are held to.

    Raises InputError for data, tokenizer and base as `fit` does, and for a module that the model lacks.
    """
    rows.validate()
    tokenizer, settings = load_tokenizer(base), load_settings(base)
    dataset = load_data(data, tokenizer, rows, encoder_decoder=settings.is_encoder_decoder)
    dataset = replace(dataset, examples=dataset.examples[:max_rows], places=dataset.places[:max_rows])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(base, ModelConfig(dtype="float32"))
    check_length(getattr(settings, "max_position_embeddings", None), rows)
    check_ids(dataset, vocabulary(model), padding=tokenizer.pad_token_id)
    with naming_memory():
        model = model.to(device)
        swap = Swap(model, _paths(model, parts), variants)
        batches = _batches(model, dataset.examples, rows.batch_size, tokenizer.pad_token_id, device)
        sums = _ask(swap, variants, batches, vocabulary(model), listen)
    tokens = int(next(iter(sums.values()))[3])
    outcomes = {name: Outcome(*(float(value) / tokens for value in total[:3])) for name, total in sums.items()}
    return Comparison(outcomes, dataset.summary(), len(dataset.examples), tokens)


def _paths(model: nn.Module, parts: Parts) -> list[str]:
    """Return the modules whose weights differ: the adapted ones, and all linear ones where the base was rounded."""
    others = linear_modules(model) if parts.requantize is not None or parts.dtype is not None else ()
    return list(dict.fromkeys([*parts.paths, *others]))


def _batches(
    model: nn.Module, examples: Sequence[Example], size: int, padding: int, device: torch.device
) -> list[Batch]:
    batches: list[Batch] = []
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], padding)
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


class Swap:
    """A loaded base whose weights can be made those of any variant. No weight is shared with another module any more:
    an update on a tied head leaves the embeddings alone."""

    def __init__(self, model: nn.Module, paths: Sequence[str], variants: Mapping[str, Variant]) -> None:
        """Raises InputError where the model has no such module, or a saved parameter does not fit it."""
        self.model, self.paths = model, paths
        self.original: dict[str, Tensor] = {}  # of the parameters that some variant replaces whole
        for name in [f"{path}.weight" for path in paths]:
            self._untie(name)
        for name, value in {name: value for one in variants.values() for name, value in one.saved.items()}.items():
            parameter = self._untie(name)
            if parameter.shape != value.shape:
                raise InputError(
                    "a parameter that the adapter carries has another shape than the base's", code="GS-3192",
                    tensor=name, expected=tuple(parameter.shape), actual=tuple(value.shape),
                    hint="the vocabulary was resized: leave --data out, or give the base with the same vocabulary",
                )  # fmt: skip
            self.original[name] = parameter.detach().clone()

    def _untie(self, name: str) -> nn.Parameter:
        path, _, own = name.rpartition(".")
        try:
            module = self.model.get_submodule(path)
            parameter = module.get_parameter(own)
        except AttributeError as err:
            raise InputError(
                "the adapter has a module that the model, as transformers builds it, does not have",
                code="GS-3193", tensor=name, expected="a module of the base's architecture",
                hint="is this the adapter's base? If it is, leave --data out: the numbers of the weights need no model",
            ) from err  # fmt: skip
        fresh = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(module, own, fresh)
        return fresh

    def to(self, variant: Variant, tell: Callable[[], None] = lambda: None) -> nn.Module:
        """Make the model that variant."""
        with torch.no_grad():
            for name, value in {**self.original, **variant.saved}.items():
                self.model.get_parameter(name).copy_(value)
            for path in self.paths:
                if f"{path}.weight" not in variant.saved:
                    module, weight = self.model.get_submodule(path), variant.weight(path)
                    module.get_parameter("weight").copy_(weight.T if is_transposed(module) else weight)
                tell()
        return self.model


def _ask(
    swap: Swap, variants: Mapping[str, Variant], batches: Sequence[Batch], width: int, listen: Listener
) -> dict[str, Tensor]:
    """Return for each variant the sums of loss, KL and agreement, and the number of tokens, (4,) in float64.

    As many batches at a time as keep the trained model's log-probabilities within KEPT.
    """
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in variants}
    groups = list(_groups(batches, width))
    total, done = len(variants) * sum(len(swap.paths) + len(group) for group in groups), 0

    def tell() -> None:
        nonlocal done
        done += 1
        listen(Progress("compare", done, total))

    for group in groups:
        trained: list[Tensor] = []  # of each batch (tokens, vocabulary)
        for name, variant in variants.items():
            model = swap.to(variant, tell)
            for index, batch in enumerate(group):
                logs, labels = _log_probabilities(model, batch)
                if len(trained) == index:
                    trained.append(logs)
                sums[name] += _against(trained[index], logs, labels)
                tell()
    return sums


def _groups(batches: Sequence[Batch], width: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    values = 0
    for batch in batches:
        size = batch["labels"].numel() * width
        if group and values + size > KEPT:
            yield group
            group, values = [], 0
        group.append(batch)
        values += size
    yield group


@torch.inference_mode()
def _log_probabilities(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits, labels = scored(model, batch)
    return torch.log_softmax(logits.float(), dim=1), labels


def _against(trained: Tensor, logs: Tensor, labels: Tensor) -> Tensor:
    """Return the sums of loss, KL(trained || logs) and agreement, and the count, over one batch's tokens."""
    loss = -logs.gather(1, labels.unsqueeze(1)).double().sum()
    wide, other = trained.double(), logs.double()  # in float32 the sum has a floor of 2e-8
    kl = (wide.exp() * (wide - other)).sum(dim=1).sum()
    agreement = (trained.argmax(dim=1) == logs.argmax(dim=1)).double().sum()
    count = torch.tensor(float(len(labels)), dtype=torch.float64, device=loss.device)
    return torch.stack([loss, kl, agreement, count]).cpu()
