"""Gradients from hooks against float64 autograd on a copy whose weights do require gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build_bart, build_gpt2, build_llama, build_t5
from torch import Tensor, nn

from gora_serve.config import IMPORTANCES, ProbeConfig
from gora_serve.errors import InputError, RunError, UsageError
from gora_serve.gora.initialize import initialize
from gora_serve.gora.statistics import GradientStatistics
from gora_serve.progress import Progress
from gora_serve.training.loss import mean_loss
from gora_serve.training.probe import probe
from gora_serve.training.probe_run import checkpointing_in_eval
from gora_serve.training.taps import tapped
from gora_serve.training.targets import linear_modules
from gora_serve.training.weights import memory_root

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
RANK_MAX = 12


def causal_batches(count: int = 3) -> list[Batch]:
    """Micro-batches of different lengths, right-padded, with prompts that carry no loss."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for index in range(count):
        ids = torch.randint(3, 300, (2, 9 + 4 * index), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : 2 + index] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def t5_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(6)
    return [
        {
            "input_ids": torch.randint(2, 96, (3, 8), generator=generator),
            "labels": torch.randint(2, 96, (3, n), generator=generator),
        }
        for n in (5, 7)
    ]


def hugging_face_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def autograd_gradients(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Batch], loss_fn: Loss
) -> dict[str, np.ndarray]:
    """The mean weight gradient, (out, in), that torch computes in float64."""
    twin = copy.deepcopy(model).double()
    twin.requires_grad_(True)
    for batch in batches:
        (loss_fn(twin, batch) / len(batches)).backward()
    gradients = {}
    for path in paths:
        module = twin.get_submodule(path)
        gradient = module.weight.grad
        assert isinstance(gradient, Tensor)
        gradients[path] = (gradient.T if type(module).__name__ == "Conv1D" else gradient).numpy()
    return gradients


def run_probe(model: nn.Module, batches: Sequence[Batch], loss_fn: Loss, **options: Any) -> GradientStatistics:
    steps = options.pop("steps", None) or len(batches)
    settings = options.pop("settings", {"mode": "exact"})
    metrics = options.pop("metrics", ("sensitivity",) if settings["mode"] == "sketch" else IMPORTANCES)
    config = ProbeConfig(steps=steps, importance=metrics, **settings)
    modules = options.pop("modules", None) or linear_modules(model)
    return probe(
        model, batches, loss_fn, modules=modules, rank_max=RANK_MAX, generator=torch.Generator().manual_seed(0),
        config=config, **options,
    )  # fmt: skip


def summed_by_hooks(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch], loss_fn: Loss
) -> dict[str, Tensor]:
    """The full gradients, which `probe` does not hand out, added up by this file's own receiver."""
    totals: dict[str, Tensor] = {}

    def receiver(path: str) -> Callable[[Tensor, Tensor], None]:
        def receive(dY: Tensor, X: Tensor) -> None:
            part = torch.einsum("to,ti->oi", dY.reshape(-1, dY.shape[-1]), X.reshape(-1, X.shape[-1]))
            totals[path] = totals.get(path, torch.zeros_like(part)) + part / len(batches)

        return receive

    with tapped(modules, {path: receiver(path) for path in modules}):
        for batch in batches:
            loss_fn(model, batch).backward()
    return totals


def relative(found: Any, expected: np.ndarray) -> float:
    difference = np.linalg.norm(np.asarray(found, dtype=np.float64) - expected)
    return float(difference / np.linalg.norm(expected))


MODELS: list[Any] = [
    pytest.param(build_llama, causal_batches, mean_loss, 14, id="llama"),
    pytest.param(build_gpt2, causal_batches, mean_loss, 8, id="gpt2"),
    pytest.param(build_t5, t5_batches, hugging_face_loss, 36, id="t5"),
]


@pytest.mark.parametrize(("build", "make_batches", "loss_fn", "count"), MODELS)
def test_hooks_see_the_gradients_that_autograd_computes(
    build: Callable[[], nn.Module], make_batches: Callable[[], list[Batch]], loss_fn: Loss, count: int
) -> None:
    model, batches = build(), make_batches()
    modules = linear_modules(model)
    assert len(modules) == count
    expected = autograd_gradients(model, list(modules), batches, loss_fn)
    found = summed_by_hooks(model, modules, batches, loss_fn)
    assert set(found) == set(expected)
    for path, gradient in expected.items():
        assert relative(found[path], gradient) < 1e-5, path


@pytest.mark.parametrize(("build", "make_batches", "loss_fn", "count"), MODELS)
def test_statistics_agree_with_float64(
    build: Callable[[], nn.Module], make_batches: Callable[[], list[Batch]], loss_fn: Loss, count: int
) -> None:
    model, batches = build(), make_batches()
    statistics = run_probe(model, batches, loss_fn)
    expected = autograd_gradients(model, list(statistics.modules), batches, loss_fn)
    assert len(statistics.modules) == count
    for path, module in statistics.modules.items():
        G = expected[path]
        raw = model.get_submodule(path)
        weight = raw.weight.double().numpy()
        W = weight.T if type(raw).__name__ == "Conv1D" else weight
        assert module.shape == G.shape
        assert module.A.shape == (min(RANK_MAX, *G.shape), G.shape[1])
        assert relative(module.compressed, G @ module.A.double().numpy().T) < 1e-5, path
        assert module.gradient_norm == pytest.approx(np.linalg.norm(G), rel=1e-5)
        assert module.importance["sensitivity"] == pytest.approx(np.abs(W * G).mean(), rel=1e-5)
        assert module.importance["sensitivity-nuclear"] == pytest.approx(np.linalg.norm(W * G, "nuc"), rel=1e-5)
        assert module.importance["gradient-nuclear"] == pytest.approx(np.linalg.norm(G, "nuc"), rel=1e-5)
    losses = [float(loss_fn(model, batch)) for batch in batches]
    assert statistics.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert statistics.steps == len(batches)


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_statistic(build: Callable[[], Any], reentrant: bool) -> None:
    """Recomputed activations count once. Reentrant checkpoints see gradients only if their input requires one."""
    model, batches = build(), causal_batches()
    paths = list(linear_modules(model))
    expected = autograd_gradients(model, paths, batches, mean_loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()  # no dropout in these models; checkpoints are only used in training mode
    calls = []
    handle = model.get_submodule(paths[0]).register_forward_hook(lambda *_: calls.append(1))
    found = summed_by_hooks(model, linear_modules(model), batches, mean_loss)
    handle.remove()
    assert len(calls) == 2 * len(batches), "the blocks were not recomputed"
    for path in paths:
        assert relative(found[path], expected[path]) < 1e-5, path


def test_a_module_used_twice_counts_twice() -> None:
    """As in ALBERT, which runs one block again and again: its gradient is the sum over its uses."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
            return y

    torch.manual_seed(0)
    model = Twice().requires_grad_(False)
    batches = [{"x": torch.randn(5, 6)} for _ in range(2)]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch["x"].to(next(model.parameters()).dtype)).square().mean()
        return loss

    modules = {"shared": model.shared, "head": model.head}
    statistics = run_probe(model, batches, loss_fn, modules=modules)
    expected = autograd_gradients(model, list(modules), batches, loss_fn)
    for path, module in statistics.modules.items():
        assert relative(module.compressed, expected[path] @ module.A.double().numpy().T) < 1e-5


def test_an_output_that_is_changed_in_place_afterwards() -> None:
    """Falcon adds the attention's output to that of its MLP in place; others have an in-place activation."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.relu_(self.first(x)))
            y += 1
            return y

    torch.manual_seed(0)
    model = InPlace().requires_grad_(False)
    batches = [{"x": torch.randn(5, 6)}]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch["x"].to(next(model.parameters()).dtype)).square().mean()
        return loss

    modules = {"first": model.first, "second": model.second}
    expected = autograd_gradients(model, list(modules), batches, loss_fn)
    found = summed_by_hooks(model, modules, batches, loss_fn)
    for path in modules:
        assert relative(found[path], expected[path]) < 1e-5


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(build: Callable[[], Any], training: bool) -> None:
    model = build().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    run_probe(model, causal_batches(), mean_loss)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_come_off_when_the_loss_fails() -> None:
    model = build_llama()

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        raise KeyError("labels")

    with pytest.raises(KeyError):
        run_probe(model, causal_batches(), broken)
    assert not any(module._forward_hooks for module in model.modules())


def test_probing_works_where_the_caller_has_turned_gradients_off() -> None:
    model = build_llama()
    with torch.no_grad():
        statistics = run_probe(model, causal_batches(), mean_loss)
    assert all(module.gradient_norm > 0 for module in statistics.modules.values())


def test_same_generator_same_statistics_and_a_independent_of_the_data() -> None:
    one, two = (run_probe(build_llama(), causal_batches(), mean_loss) for _ in range(2))
    other = run_probe(build_llama(), causal_batches(1), mean_loss)
    for path, module in one.modules.items():
        assert torch.equal(module.compressed, two.modules[path].compressed)
        assert torch.equal(module.A, other.modules[path].A)


def test_steps_limit_the_batches_and_counts_are_reported() -> None:
    events: list[Progress] = []
    statistics = run_probe(
        build_llama(), causal_batches(3), mean_loss, steps=2, listen=events.append,
        count_batch=lambda batch: (len(batch["labels"]), int(batch["attention_mask"].sum())),
    )  # fmt: skip
    assert (statistics.steps, statistics.samples) == (2, 4)
    assert statistics.tokens == (2 * 9 - 3) + (2 * 13 - 3)
    assert [(event.stage, event.done, event.total) for event in events] == [("probe", 1, 2), ("probe", 2, 2)]
    expected = autograd_gradients(build_llama(), list(statistics.modules), causal_batches(2), mean_loss)
    for path, module in statistics.modules.items():
        assert module.gradient_norm == pytest.approx(np.linalg.norm(expected[path]), rel=1e-5)


def test_reduce_makes_two_shares_one_probe() -> None:
    """Doubling every sum is what two processes with equal batches see: means stay, counts double."""
    alone = run_probe(build_llama(), causal_batches(), mean_loss)
    both = run_probe(build_llama(), causal_batches(), mean_loss, reduce=lambda tensor: tensor * 2)
    assert both.steps == 2 * alone.steps
    assert both.loss == pytest.approx(alone.loss)
    for path, module in alone.modules.items():
        torch.testing.assert_close(both.modules[path].compressed, module.compressed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_probe(value: float) -> None:
    calls = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return mean_loss(model, batch) * (value if len(calls) == 2 else 1.0)

    with pytest.raises(RunError, match="GS-701") as caught:
        run_probe(build_llama(), causal_batches(), loss_fn)
    assert "step 2" in caught.value.what


def test_no_batch_is_an_input_error() -> None:
    with pytest.raises(InputError, match="GS-370"):
        run_probe(build_llama(), [], mean_loss, steps=4)


def test_a_loss_that_reaches_no_target_is_an_input_error() -> None:
    model = build_llama()

    def loss_fn(model: Any, batch: Batch) -> Tensor:
        value: Tensor = model.model.embed_tokens(batch["input_ids"]).sum().clone().requires_grad_()
        return value

    with pytest.raises(InputError, match="GS-371"):
        run_probe(model, causal_batches(1), loss_fn)


def test_one_module_out_of_reach_has_importance_0() -> None:
    """An expert that no token is routed to: legal, and worth no rank."""
    model = build_llama()
    modules = linear_modules(model) | {"idle": nn.Linear(4, 6).requires_grad_(False)}
    statistics = run_probe(model, causal_batches(1), mean_loss, modules=modules, metrics=("sensitivity",))
    assert statistics.modules["idle"].importance["sensitivity"] == 0.0
    assert not statistics.modules["idle"].compressed.any()


SKETCH = {"mode": "sketch"}


@pytest.mark.parametrize(("build", "make_batches", "loss_fn", "count"), MODELS)
def test_a_sketch_of_all_rows_is_the_exact_probe(
    build: Callable[[], nn.Module], make_batches: Callable[[], list[Batch]], loss_fn: Loss, count: int
) -> None:
    """A tiny model's modules have few rows, so an error as small as this takes them all."""
    model, batches = build(), make_batches()
    exact = run_probe(model, batches, loss_fn)
    sketch = run_probe(model, batches, loss_fn, settings=SKETCH | {"error": 1e-4})
    assert (sketch.mode, exact.mode, len(sketch.modules)) == ("sketch", "exact", count)
    assert (sketch.steps, sketch.loss) == (exact.steps, exact.loss)
    for path, module in sketch.modules.items():
        other = exact.modules[path]
        assert module.rows == module.shape[0]
        assert module.importance_error == 0.0
        assert torch.equal(module.A, other.A)
        assert relative(module.compressed, other.compressed.double().numpy()) < 1e-5
        assert module.importance["sensitivity"] == pytest.approx(other.importance["sensitivity"], rel=1e-5)
        assert module.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)


def test_a_sketch_gives_the_b_of_the_exact_gradient() -> None:
    model, batches = build_llama(hidden_size=64, intermediate_size=192), causal_batches()
    exact = run_probe(model, batches, mean_loss)
    sketch = run_probe(model, batches, mean_loss, settings=SKETCH | {"error": 0.2})
    sampled = [path for path, module in sketch.modules.items() if module.rows < module.shape[0]]  # type: ignore[operator]
    assert len(sampled) > 4
    for path, module in exact.modules.items():
        for rank in (1, 7, 12):
            _, expected = initialize(module.A, module.compressed, rank=rank, gamma=0.05, alpha=16.0)
            other = sketch.modules[path]
            _, found = initialize(other.A, other.compressed, rank=rank, gamma=0.05, alpha=16.0)
            assert relative(found, expected.double().numpy()) < 1e-4, path
        stated = max(4 * sketch.modules[path].importance_error, 1e-4)
        assert sketch.modules[path].importance["sensitivity"] == pytest.approx(
            module.importance["sensitivity"], rel=stated
        )


def test_a_sketch_under_gradient_checkpointing() -> None:
    model, batches = build_llama(), causal_batches()
    plain = run_probe(model, batches, mean_loss, settings=SKETCH)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = run_probe(model, batches, mean_loss, settings=SKETCH)
    for path, module in plain.modules.items():
        assert relative(again.modules[path].compressed, module.compressed.double().numpy()) < 1e-5


def test_three_arguments_are_enough() -> None:
    """Any module with linear layers; the output head of a model that has none to name is a layer like others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    batches = [torch.randn(5, 6) for _ in range(3)]
    statistics = probe(model, batches, lambda model, batch: model(batch).square().mean())
    assert {path: module.shape for path, module in statistics.modules.items()} == {"0": (8, 6), "2": (3, 8)}
    assert statistics.steps == 3


def test_auto_stops_once_the_ranks_stand_still() -> None:
    """The same batch again and again changes no mean: settled at the third look. Other batches are looked at on."""
    model, (batch, *_) = build_llama(), causal_batches()
    same = run_probe(model, [batch] * 40, mean_loss, steps="auto", metrics=("sensitivity",))
    assert (same.steps, same.stopped_early) == (12, True)
    generator = torch.Generator().manual_seed(0)
    changing = []
    for _ in range(40):
        ids = torch.randint(3, 300, (2, 9), generator=generator)
        changing.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    wandering = run_probe(model, changing, mean_loss, steps="auto", metrics=("sensitivity",))
    assert wandering.steps > 12


def test_exploratory_steps_are_sgd_and_leave_no_trace() -> None:
    """GoRA-pro against torch's own SGD in float64: mean gradient along the way, weights afterwards as before."""
    batches, lr = causal_batches(), 0.05
    model = build_llama()
    before = memory_root(model)
    statistics = run_probe(model, batches, mean_loss, settings={"mode": "exact", "lr": lr})
    assert memory_root(model) == before
    twin = build_llama().double()
    paths = list(statistics.modules)
    weights = [twin.get_submodule(path).weight.requires_grad_(True) for path in paths]
    optimizer = torch.optim.SGD(weights, lr=lr)
    totals = [torch.zeros_like(weight) for weight in weights]
    start = [weight.detach().clone() for weight in weights]
    for batch in batches:
        optimizer.zero_grad()
        mean_loss(twin, batch).backward()
        for total, weight in zip(totals, weights, strict=True):
            total += weight.grad / len(batches)
        optimizer.step()
    plain = run_probe(build_llama(), batches, mean_loss)
    for path, total, weight in zip(paths, totals, start, strict=True):
        module = statistics.modules[path]
        assert relative(module.compressed, (total @ module.A.double().T).numpy()) < 1e-4
        assert module.importance["sensitivity"] == pytest.approx(float((weight * total).abs().mean()), rel=1e-4)
        assert relative(plain.modules[path].compressed, (total @ module.A.double().T).numpy()) > 1e-3


def test_exploratory_steps_are_undone_when_the_probe_fails() -> None:
    model = build_gpt2()
    before = memory_root(model)
    calls = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(memory_root(model))
        if len(calls) == 3:
            raise KeyError("labels")
        return mean_loss(model, batch)

    with pytest.raises(KeyError):
        run_probe(model, causal_batches(), loss_fn, settings={"mode": "exact", "lr": 0.1})
    assert calls[0] == before != calls[2]
    assert memory_root(model) == before


@pytest.mark.parametrize("build", [build_t5, build_bart])
def test_checkpoints_in_eval_mode_bring_no_dropout(build: Callable[..., Any]) -> None:
    """Their blocks apply dropout by the flag that also decides whether they use checkpoints."""
    plain = run_probe(build(dropout=0.5), t5_batches(), hugging_face_loss)
    model = build(dropout=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    path = next(iter(linear_modules(model)))
    handle = model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    with checkpointing_in_eval(model):
        again = run_probe(model, t5_batches(), hugging_face_loss)
    handle.remove()
    assert len(calls) == 2 * len(t5_batches()), "the blocks were not recomputed"
    assert not any(module.training for module in model.modules())
    for path, module in plain.modules.items():
        assert relative(again.modules[path].compressed, module.compressed.double().numpy()) < 1e-5


def test_a_sketch_under_autocast() -> None:
    """There the output's gradient is bfloat16 and the input still float32, as the layer got it."""
    model, batches = build_llama(), causal_batches()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_loss(model, batch)

    sketch = run_probe(model, batches, loss_fn, settings=SKETCH)
    exact = run_probe(model, batches, loss_fn)
    for path, module in exact.modules.items():
        assert relative(sketch.modules[path].compressed, module.compressed.double().numpy()) < 0.03


def test_a_model_that_is_not_frozen_gets_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept.clone()
    probe(model, [torch.randn(5, 6)] * 2, lambda model, batch: model(batch).square().mean())
    assert torch.equal(model[0].weight.grad, kept)
    assert model[2].weight.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_is_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(input=x)
            return y

    torch.manual_seed(0)
    model, x = ByKeyword().requires_grad_(False), torch.randn(5, 6)
    statistics = probe(model, [x], lambda model, batch: model(batch).square().mean())
    G = (2 * model(x).double() / 15).T @ x.double()
    module = statistics.modules["layer"]
    assert relative(module.compressed, (G @ module.A.double().T).numpy()) < 1e-5


def test_exploratory_steps_of_a_weight_that_two_layers_share() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)).requires_grad_(False)
    model[2].weight = model[0].weight
    batches = [torch.randn(5, 6) for _ in range(3)]
    losses: list[float] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        losses.append(float(loss.detach()))
        return loss

    probe(model, batches, loss_fn, config=ProbeConfig(steps=3, mode="exact", lr=0.5))
    twin = nn.Parameter(model[0].weight.double())
    for batch, seen in zip(batches, losses, strict=True):
        loss = (torch.tanh(batch.double() @ twin.T) @ twin.T).square().mean()
        assert seen == pytest.approx(float(loss.detach()), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, twin)
        with torch.no_grad():
            twin -= 0.5 * gradient


def test_settings_that_cannot_be_are_refused_from_python_too() -> None:
    with pytest.raises(UsageError, match="GS-201"):
        run_probe(build_llama(), causal_batches(), mean_loss, settings=SKETCH, metrics=("gradient-nuclear",))
