"""GoRA without gora-serve's own loop: `transformers.Trainer` trains what gora-serve probed, ranked and initialised.

The adapter that comes out is exported like any other: standard LoRA, sealed, and bound to the base that it was trained
against, which `gora-serve verify OUTPUT --base BASE` proves. BASE is a model folder or a hub id.

    python examples/trainer.py BASE --output adapter

With --trl, TRL's SFTTrainer trains instead; it is given the very tokens and labels that were probed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gora_serve.adapter.factors import BaseId, LoraFactors
from gora_serve.config import DataConfig, FitConfig, InitConfig, ModelConfig, ProbeConfig, RankConfig, TrainConfig
from gora_serve.errors import GoraError, InputError
from gora_serve.gora.ranks import allocate_ranks
from gora_serve.integrity.bases import Base, locate_base
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.staging import check_target
from gora_serve.training import inject
from gora_serve.training.data import check_ids, collate, load_data, schedule
from gora_serve.training.encode import Example
from gora_serve.training.export import export_adapter
from gora_serve.training.lengths import check_length
from gora_serve.training.loop import make_optimizer
from gora_serve.training.loss import mean_loss
from gora_serve.training.models import check_causal, load_model, load_settings, load_tokenizer, vocabulary
from gora_serve.training.probe import probe
from gora_serve.training.weights import is_transposed, memory_root

DATA = Path(__file__).parent / "data" / "requests" / "train.jsonl"
Collate = Callable[[Sequence[Example]], Mapping[str, Tensor]]


def start(base: nn.Module, examples: Sequence[Example], collated: Collate, options: Any) -> Mapping[str, LoraFactors]:
    """Return the starting adapter: gradients of some batches, a rank for every module, B from the gradients."""
    ranks = RankConfig(rank=options.rank)
    device = next(base.parameters()).device
    indices = schedule(len(examples), options.batch_size, batches=options.probe_steps, seed=0)
    batches = (collated([examples[i] for i in chosen]) for chosen in indices)
    statistics = probe(
        base,
        ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches),
        mean_loss,
        config=ProbeConfig(steps=options.probe_steps),
        ranks=ranks,
    )
    shapes = {path: module.shape for path, module in statistics.modules.items()}
    plan = allocate_ranks(statistics.importances("sensitivity"), shapes, ranks)
    return inject.gora_factors(statistics, plan, gamma=options.gamma, alpha=16.0)


def train(model: nn.Module, examples: Sequence[Example], tokenizer: Any, options: Any, folder: str) -> None:
    """Any loop will do: the LoRA layers are PEFT's. B learns faster than A, which the optimiser's groups say."""
    settings: dict[str, Any] = {
        "output_dir": folder,  # nothing is written there without a save_strategy
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "lr_scheduler_type": "cosine",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, options.steps // 4),
        "disable_tqdm": True,
        "seed": 0,
    }
    optimizers = (make_optimizer(model, TrainConfig(lr=options.lr)), None)
    make = sft_trainer if options.trl else plain_trainer
    make(model, examples, tokenizer, settings, optimizers).train()


def plain_trainer(model: Any, examples: Sequence[Example], tokenizer: Any, settings: Any, optimizers: Any) -> Trainer:
    settings = TrainingArguments(label_names=["labels"], remove_unused_columns=False, **settings)
    collated = partial(collate, pad_token_id=tokenizer.pad_token_id)
    return Trainer(model, settings, train_dataset=list(examples), data_collator=collated, optimizers=optimizers)


def sft_trainer(model: Any, examples: Sequence[Example], tokenizer: Any, settings: Any, optimizers: Any) -> Trainer:
    """TRL takes rows of tokens and labels as they are, and pads them itself."""
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**{**settings, "bf16": False, "max_length": None, "gradient_checkpointing": False})
    rows = Dataset.from_list([asdict(example) for example in examples])
    trainer: Trainer = SFTTrainer(
        model, settings, train_dataset=rows, processing_class=tokenizer, optimizers=optimizers
    )
    return trainer


def has_conv1d(base: nn.Module) -> bool:
    """GPT-2's linear layers keep their weights transposed."""
    return any(map(is_transposed, base.modules()))


@torch.no_grad()
def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    device = next(model.parameters()).device
    return float(mean_loss(model.eval(), {name: tensor.to(device) for name, tensor in batch.items()}))


def reload(base: Base, adapter: Path) -> nn.Module:
    """What a user of the adapter does: PEFT, on the untouched base."""
    model: nn.Module = PeftModel.from_pretrained(load_model(base, ModelConfig(dtype="float32")), str(adapter))
    return model


def load(options: Any) -> tuple[Base, nn.Module, Any, tuple[Example, ...]]:
    """Return base, model, tokenizer and rows, or raise GoraError, before the work that takes time.

    The configurations know which settings make no sense; the checks are those of `gora-serve fit`.
    """
    rows = DataConfig(max_length=options.max_length, batch_size=options.batch_size)
    FitConfig(
        data=rows,
        probe=ProbeConfig(steps=options.probe_steps),
        ranks=RankConfig(rank=options.rank),
        init=InitConfig(gamma=options.gamma),
        train=TrainConfig(steps=options.steps, lr=options.lr),
    ).validate()
    located = locate_base(options.base)
    check_target(options.output, overwrite=False, protect=[located.path])
    if load_settings(located).is_encoder_decoder:
        what = "this example trains causal language models; gora-serve fit takes encoder-decoders too"
        raise InputError(what, code="GS-345", file=located.path)
    tokenizer = load_tokenizer(located)
    data = load_data(options.data, tokenizer, rows)
    base = load_model(located, ModelConfig(dtype="float32"))
    check_length(getattr(base.config, "max_position_embeddings", None), rows)
    check_ids(data, vocabulary(base), padding=tokenizer.pad_token_id)
    check_causal(base, located, device=torch.device("cpu"))
    return located, base, tokenizer, data.examples


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("base", help="model folder or hub id of a causal language model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the exported adapter")
    parser.add_argument("--data", default=str(DATA), help="rows of prompt and completion, messages, or text")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--probe-steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--gamma", type=float, default=0.1, help="size of the first step")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--trl", action="store_true", help="train with TRL's SFTTrainer; needs pip install trl")
    options = parser.parse_args(arguments)
    if options.trl and find_spec("trl") is None:
        parser.error("--trl needs TRL: pip install trl")
    try:
        run(options)
    except GoraError as err:  # its text says what to do
        print(err, file=sys.stderr)
        sys.exit(err.exit_code)


def run(options: Any) -> None:
    located, base, tokenizer, examples = load(options)
    roots = hash_model(located.path).roots

    def collated(rows: Sequence[Example]) -> dict[str, Tensor]:
        return collate(rows, tokenizer.pad_token_id)

    before = memory_root(base)
    batch = collated(examples[: options.batch_size])
    print(f"loss of the base         {loss_of(base, batch):.4f}")
    kind: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": has_conv1d(base)}  # PEFT's words
    model = inject.attach(base, start(base, examples, collated, options), **kind)
    print(f"loss before training     {loss_of(model, batch):.4f}")
    with tempfile.TemporaryDirectory() as folder:
        train(model, examples, tokenizer, options, folder)
    trained = loss_of(model, batch)
    print(f"loss after training      {trained:.4f}")

    identity = BaseId(located.name, located.revision, roots)
    adapter = inject.extract(model, base=identity, origin={"method": "gora"}, **kind)
    assert memory_root(inject.detach(model)) == before, "the base's weights in memory changed"
    export_adapter(adapter, options.output, protect=[located.path])
    print(f"loss as PEFT reloads it  {loss_of(reload(located, options.output), batch):.4f}")
    ranks = adapter.ranks.values()
    print(f"wrote {options.output}: {adapter.parameters} parameters, ranks {min(ranks)} to {max(ranks)}")


if __name__ == "__main__":
    main()
