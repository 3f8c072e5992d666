"""GoRA on a model that is no language model: a small vision transformer on the digits of scikit-learn.

The base learns the digits 0 to 4 and is frozen. The new task is 5 to 9: a new head is fitted to the frozen features
(a linear probe), and then the frozen model is adapted, once with plain LoRA and once with GoRA, with equally many
parameters and each at the learning rate that is best for it on validation rows.

    python examples/vision.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from gora_serve.adapter.factors import BaseId, LoraFactors
from gora_serve.config import Method, RankConfig, TrainConfig
from gora_serve.gora.gamma import search_gamma
from gora_serve.gora.ranks import RankPlan, allocate_ranks, uniform_ranks
from gora_serve.training import inject
from gora_serve.training.export import export_adapter
from gora_serve.training.loop import cosine_with_floor, make_optimizer
from gora_serve.training.probe import probe
from gora_serve.training.targets import linear_modules
from gora_serve.training.weights import weight_shape

Batch = tuple[Tensor, Tensor]  # images (rows, 1, 8, 8) and classes 0 to 4 (rows,)
RATES = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "gora": (1e-4, 3e-4, 1e-3, 3e-3)}  # of A; GoRA's B learns 16 times faster


def images(digits: Sequence[int]) -> dict[str, Batch]:
    """Return the rows of these digits: half to train on, a quarter to choose settings by, a quarter to test."""
    data = load_digits()
    wanted = torch.isin(torch.tensor(data.target), torch.tensor(digits))
    pixels = torch.tensor(data.images, dtype=torch.float32)[wanted].unsqueeze(1) / 16
    classes = torch.tensor(data.target)[wanted] - min(digits)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split([len(order) // 2, 3 * len(order) // 4])
    return {name: (pixels[part], classes[part]) for name, part in zip(("train", "choose", "test"), parts, strict=True)}


def batches(rows: Batch, steps: int, *, size: int = 32, seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(rows[1]), (size,), generator=generator)
        yield rows[0][chosen], rows[1][chosen]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """What the probe needs of a task: a scalar, the mean over the batch."""
    pixels, classes = batch
    return nn.functional.cross_entropy(model(pixel_values=pixels).logits, classes)


def train(model: nn.Module, rows: Batch, steps: int, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(batches(rows, steps, seed=1)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine_with_floor(step, steps, warmup=0.03, floor=0.1)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, rows: Batch) -> tuple[float, float]:
    """Return loss and accuracy."""
    logits = model(pixel_values=rows[0]).logits
    return float(nn.functional.cross_entropy(logits, rows[1])), float((logits.argmax(1) == rows[1]).float().mean())


def make_base(steps: int) -> Any:
    """Train a vision transformer on the digits 0 to 4, then freeze it."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    train(model, images(range(5))["train"], steps, torch.optim.AdamW(model.parameters(), lr=2e-3))
    return model.requires_grad_(False).eval()


def fit_head(model: Any, rows: Batch, steps: int) -> None:
    """Give the frozen model a new head, fitted to its features. Head and body are then the base of both methods."""
    with torch.no_grad():
        features = model.vit(pixel_values=rows[0]).last_hidden_state[:, 0]  # (rows, hidden)
    head = nn.Linear(features.shape[1], 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), rows[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.classifier = head.requires_grad_(False)


def gora_start(base: Any, rows: Batch, held_out: Batch, ranks: RankConfig) -> tuple[RankPlan, dict[str, LoraFactors]]:
    """Probe, allocate, initialise: `probe` needs the model, batches and a loss, and takes every linear layer."""
    statistics = probe(base, batches(rows, 16, seed=2), loss_fn, ranks=ranks)
    shapes = {path: module.shape for path, module in statistics.modules.items()}
    plan = allocate_ranks(statistics.importances("sensitivity"), shapes, ranks)
    factors = inject.gora_factors(statistics, plan, gamma=1.0, alpha=16.0)
    model = attach(base, factors)

    def loss_at(gamma: float) -> float:
        with inject.scaled(model, gamma):
            return measure(model, held_out)[0]

    gamma = search_gamma(loss_at).gamma
    return plan, {path: LoraFactors(f.A, f.B * gamma, f.scale) for path, f in factors.items()}


def lora_start(base: Any, ranks: RankConfig) -> tuple[RankPlan, dict[str, LoraFactors]]:
    shapes = {path: weight_shape(module) for path, module in linear_modules(base).items()}
    plan = uniform_ranks(shapes, ranks)
    return plan, inject.lora_factors(plan, alpha=16.0, generator=torch.Generator().manual_seed(3))


def attach(base: Any, factors: dict[str, LoraFactors]) -> nn.Module:
    """LoRA layers on a copy. A model that PEFT has no class for has task_type None."""
    return inject.attach(copy.deepcopy(base), factors, task_type=None, fan_in_fan_out=False)


def best(base: Any, method: Method, factors: dict[str, LoraFactors], data: dict[str, Batch], steps: int) -> Any:
    """Train at every learning rate of the method and keep the model with the lowest loss on the validation rows."""
    found = []
    for rate in RATES[method]:
        model = attach(base, factors)
        train(model, data["train"], steps, make_optimizer(model, TrainConfig(method=method, lr=rate)))
        found.append((measure(model, data["choose"])[0], rate, model))
    return min(found, key=lambda entry: entry[0])[1:]


def count(text: str) -> int:
    """A whole number that is at least 1, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--base-steps", type=count, default=300, help="of training on the digits 0 to 4")
    parser.add_argument("--steps", type=count, default=60, help="of every adaptation")
    parser.add_argument("--rank", type=count, default=2, help="LoRA's; GoRA gets as many parameters")
    options = parser.parse_args(arguments)
    base = make_base(options.base_steps)
    print(f"base: {measure(base, images(range(5))['test'])[1]:.3f} of the digits 0 to 4 are right")

    data = images(range(5, 10))
    fit_head(base, data["train"], options.steps)
    ranks = RankConfig(rank=options.rank, rule="exact")
    starts: dict[Method, tuple[RankPlan, dict[str, LoraFactors]]] = {
        "lora": lora_start(base, ranks),
        "gora": gora_start(base, data["train"], data["choose"], ranks),
    }

    print("digits 5 to 9           parameters  rate of A  test loss  right")
    loss, right = measure(base, data["test"])
    print(f"{'new head':22} {0:11} {'':10} {loss:10.3f} {right:6.3f}")
    for method, (plan, factors) in starts.items():
        loss, right = measure(attach(base, factors), data["test"])
        print(f"{method + ', before training':22} {plan.parameters:11} {'':10} {loss:10.3f} {right:6.3f}")
        rate, model = best(base, method, factors, data, options.steps)
        loss, right = measure(model, data["test"])
        print(f"{method:22} {plan.parameters:11} {rate:10.0e} {loss:10.3f} {right:6.3f}")

    adapter = inject.extract(model, base=BaseId("vit-digits"), origin={}, task_type=None, fan_in_fan_out=False)
    with tempfile.TemporaryDirectory() as folder:
        export_adapter(adapter, Path(folder) / "adapter")
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(Path(folder) / "adapter"))
        difference = abs(measure(again, data["test"])[0] - loss)
    print(f"ranks {dict(sorted(adapter.ranks.items(), key=lambda item: -item[1])[:4])} ...")
    print(f"exported, and loaded by PEFT onto the same base: the test loss differs by {difference:.1e}")


if __name__ == "__main__":
    main()
