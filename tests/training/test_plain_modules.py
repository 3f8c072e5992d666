"""Modules that are nobody's language model: probed with three arguments, attached, exported, loaded by PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from gora_serve.adapter.factors import BaseId
from gora_serve.config import RankConfig
from gora_serve.gora.ranks import allocate_ranks
from gora_serve.training import inject
from gora_serve.training.export import export_adapter
from gora_serve.training.probe import probe
from gora_serve.training.targets import linear_modules

Batch = tuple[Tensor, Tensor]


class Branches(nn.Module):
    """Two branches, one of them a Sequential with numbers for names; no configuration, no head."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
        self.right = nn.Linear(6, 5, bias=False)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.left(x) + self.right(x))
        return result


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    inputs, target = batch
    return nn.functional.mse_loss(model(inputs), target)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Branches().requires_grad_(False).eval()


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(9, 6, generator=generator), torch.randn(9, 5, generator=generator)) for _ in range(4)]


def test_three_arguments_are_enough(model: nn.Module, batches: list[Batch]) -> None:
    statistics = probe(model, batches, loss_fn)
    twin = copy.deepcopy(model).double().requires_grad_(True)
    for inputs, target in batches:
        (loss_fn(twin, (inputs.double(), target.double())) / len(batches)).backward()  # type: ignore[no-untyped-call]
    assert list(statistics.modules) == ["left.0", "left.2", "right"]
    for path, module in statistics.modules.items():
        G = twin.get_parameter(f"{path}.weight").grad
        W = twin.get_parameter(f"{path}.weight").detach()
        assert G is not None
        assert module.A.shape == (min(RankConfig().highest, *G.shape), G.shape[1])
        np.testing.assert_allclose(module.compressed, G @ module.A.double().T, rtol=1e-4, atol=1e-6)
        assert module.importance["sensitivity"] == pytest.approx(float((W * G).abs().mean()), rel=1e-5)
    again = probe(model, batches, loss_fn)
    assert all(torch.equal(again.modules[path].A, module.A) for path, module in statistics.modules.items())


def test_from_the_probe_to_an_adapter_that_peft_loads(model: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    inputs = batches[0][0]
    base = copy.deepcopy(model)
    statistics = probe(model, batches, loss_fn)
    shapes = {path: module.shape for path, module in statistics.modules.items()}
    plan = allocate_ranks(statistics.importances("sensitivity"), shapes, RankConfig(rank=2))
    factors = inject.gora_factors(statistics, plan, gamma=0.2, alpha=16.0)
    wrapped = inject.attach(model, factors, task_type=None, fan_in_fan_out=False)
    before = sum(float(loss_fn(base, batch)) for batch in batches)
    assert sum(float(loss_fn(wrapped, batch).detach()) for batch in batches) < before
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for batch in batches:
        loss_fn(wrapped, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    trained = wrapped(inputs).detach()

    adapter = inject.extract(wrapped, base=BaseId("branches"), origin={}, task_type=None, fan_in_fan_out=False)
    folder = export_adapter(adapter, tmp_path / "adapter").folder
    with torch.no_grad():
        served = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(inputs)
        edited = copy.deepcopy(base)
        for path, factor in adapter.modules.items():
            edited.get_parameter(f"{path}.weight").add_(factor.delta())
        torch.testing.assert_close(served, trained, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(edited(inputs), trained, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(base(inputs), trained, atol=1e-2)
    untouched = inject.detach(wrapped).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in base.state_dict().items())


def test_torchs_own_attention_is_left_out() -> None:
    """It reads the weight of its output layer without calling the layer: an adapter there would never be seen."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(linear_modules(model)) == ["linear1", "linear2"]
