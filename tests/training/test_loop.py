"""The training loop against transformers' own loss, torch's own AdamW and a schedule computed by hand."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_models import MakeAdapter, build_gpt2, build_llama
from torch import Tensor, nn

from gora_serve.config import TrainConfig
from gora_serve.errors import RunError
from gora_serve.progress import Progress, silent
from gora_serve.training import inject
from gora_serve.training.loop import cosine_with_floor, evaluate, make_optimizer, train
from gora_serve.training.loss import loss_tokens, mean_loss

Batch = dict[str, Tensor]


def make_batch(seed: int, rows: int = 2, length: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 3 + seed % 3] = -100
    labels[0, 6] = -100  # a gap, as between two assistant turns
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_model(make_adapter: MakeAdapter, build: Callable[[], Any] = build_llama) -> Any:
    """A base with trainable LoRA layers on two modules."""
    gpt2 = build is build_gpt2
    paths = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"] if gpt2 else [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    ]  # fmt: skip
    shapes = dict(zip(paths, [(96, 32), (128, 32)] if gpt2 else [(32, 32), (32, 64)], strict=True))
    adapter = make_adapter({paths[0]: 2, paths[1]: 5}, shapes=shapes)
    return inject.attach(build(), adapter.modules, task_type="CAUSAL_LM", fan_in_fan_out=gpt2)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean_loss_is_transformers_loss(make_adapter: MakeAdapter, build: Callable[[], Any], seed: int) -> None:
    model, batch = lora_model(make_adapter, build), make_batch(seed)
    theirs = model(**batch).loss
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    ours = mean_loss(model, batch)
    ours.backward()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert len(expected) == 4
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_loss_tokens_counts_what_the_loss_averages_over() -> None:
    batch = make_batch(0)
    logits = build_llama()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    summed = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    assert float(summed / loss_tokens(batch)) == pytest.approx(float(mean_loss(build_llama(), batch)), rel=1e-5)


def test_cosine_with_floor_by_hand() -> None:
    """100 steps, warm-up 3: 1/4, 2/4, 3/4, then from 1 by a half cosine over 96 steps to 0.1."""

    def factor(step: int) -> float:
        return cosine_with_floor(step, 100, warmup=0.03, floor=0.1)

    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(3 + 48) == pytest.approx(0.55)  # halfway down
    assert factor(3 + 32) == pytest.approx(0.1 + 0.9 * 0.75)  # cos 60° = 1/2
    assert factor(99) == pytest.approx(0.1)
    factors = [factor(step) for step in range(3, 100)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_move_from_the_first_step(steps: int) -> None:
    factors = [cosine_with_floor(step, steps, warmup=0.03, floor=0.1) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0 or steps <= 2


@pytest.mark.parametrize(("warmup", "steps", "warm"), [(0.07, 100, 7), (0.03, 100, 3), (0.03, 101, 4), (0.0, 100, 0)])
def test_warmup_takes_its_share_of_steps(warmup: float, steps: int, warm: int) -> None:
    """In floats 0.07 * 100 is more than 7."""
    factors = [cosine_with_floor(step, steps, warmup=warmup, floor=0.1) for step in range(steps)]
    assert factors.index(1.0) == warm


def test_no_warmup_and_no_floor() -> None:
    assert [cosine_with_floor(s, 3, warmup=0.0, floor=0.0) for s in range(3)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("config", "ratio"), [(TrainConfig(), 16.0), (TrainConfig(method="lora"), 1.0), (TrainConfig(lr_ratio=4.0), 4.0)]
)
def test_b_learns_faster_by_the_ratio(make_adapter: MakeAdapter, config: TrainConfig, ratio: float) -> None:
    model = lora_model(make_adapter)
    optimizer = make_optimizer(model, config)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(rate) == 4
    for name, parameter in trainable.items():
        assert rate[id(parameter)] == config.lr * (ratio if "lora_B" in name else 1.0)
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    assert all(group["weight_decay"] == 5e-4 for group in optimizer.param_groups)


def run(
    model: nn.Module, batches: list[Batch], config: TrainConfig, **options: Any
) -> tuple[list[Mapping[str, float]], list[int]]:
    records: list[Mapping[str, float]] = []
    steps: list[int] = []
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=config.grad_accum)
    train(
        model, [lambda b=b: b for b in batches], accelerator=accelerator, config=config, record=records.append,
        after_step=steps.append, listen=options.get("listen", silent),
    )  # fmt: skip
    return records, steps


def test_what_is_done_after_a_step_is_no_time_of_training(make_adapter: MakeAdapter) -> None:
    records: list[tuple[float, float]] = []
    train(
        lora_model(make_adapter), [lambda: make_batch(0)] * 3, accelerator=Accelerator(cpu=True), config=TrainConfig(),
        record=lambda line: records.append((time.perf_counter(), line["seconds"])),
        after_step=lambda _: time.sleep(0.2), listen=silent,
    )  # fmt: skip
    (began, first), _, (ended, last) = records
    assert last - first < ended - began - 0.3, "two pauses lie between"


def torch_training(model: nn.Module, groups: list[list[Batch]], config: TrainConfig) -> list[float]:
    """Plain torch: the mean of the micro-batches' mean losses, AdamW, learning rates by hand. Returns the norms."""
    A = [p for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n]
    B = [p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n]
    common: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
    slow, fast = torch.optim.AdamW(A, lr=config.lr, **common), torch.optim.AdamW(B, lr=config.lr, **common)
    norms = []
    for step, group in enumerate(groups):
        losses = [model(**batch).loss for batch in group]
        torch.stack(losses).mean().backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in A + B if p.grad is not None]).norm()))
        factor = cosine_with_floor(step, len(groups), warmup=config.warmup, floor=config.floor)
        slow.param_groups[0]["lr"] = config.lr * factor
        fast.param_groups[0]["lr"] = config.lr * config.ratio * factor
        for optimizer in (slow, fast):
            optimizer.step()
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_training_is_plain_torch_training(make_adapter: MakeAdapter, grad_accum: int) -> None:
    """With accumulation a step follows the mean of its micro-batches' means, whatever their token counts."""
    config = TrainConfig(lr=1e-3, grad_accum=grad_accum)
    batches = [make_batch(seed, rows=4 if seed % 2 else 2) for seed in range(6)]
    model = lora_model(make_adapter)
    twin = copy.deepcopy(model)
    groups = [batches[start : start + grad_accum] for start in range(0, 6, grad_accum)]
    norms = torch_training(twin, groups, config)
    records, steps = run(model, batches, config)
    assert steps == list(range(1, len(groups) + 1))
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    expected = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5)


def test_two_times_four_rows_are_eight_where_token_counts_agree(make_adapter: MakeAdapter) -> None:
    """Equal counts of labelled tokens: the mean of two means is the mean of all."""
    eight = make_batch(0, rows=8)
    eight["attention_mask"][:] = 1
    eight["labels"] = eight["input_ids"].clone()
    eight["labels"][:, :4] = -100
    halves = [{name: tensor[rows] for name, tensor in eight.items()} for rows in (slice(0, 4), slice(4, 8))]
    model = lora_model(make_adapter)
    twin = copy.deepcopy(model)
    one, _ = run(model, [eight], TrainConfig(lr=1e-3))
    two, _ = run(twin, halves, TrainConfig(lr=1e-3, grad_accum=2))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    assert two[0]["tokens"] == one[0]["tokens"] == 8 * 12


def test_records_hold_loss_rate_and_tokens(make_adapter: MakeAdapter) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    model = lora_model(make_adapter)
    first = float(mean_loss(model, batches[0]).detach())
    events: list[Progress] = []
    records, _ = run(model, batches, TrainConfig(lr=1e-3), listen=events.append)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert [record["lr"] for record in records] == pytest.approx(
        [1e-3 * cosine_with_floor(step, 3, warmup=0.03, floor=0.1) for step in range(3)]
    )
    assert [record["tokens"] for record in records] == [20, 40, 60]
    assert [(event.done, event.total) for event in events] == [(1, 3), (2, 3), (3, 3)]


def test_the_gradient_norm_is_clipped_only_where_asked(make_adapter: MakeAdapter) -> None:
    """Clipping to a tiny norm under AdamW keeps the direction's sign; the recorded norm is the one before."""
    free, _ = run(lora_model(make_adapter), [make_batch(0)], TrainConfig(lr=1e-3))
    tight, _ = run(lora_model(make_adapter), [make_batch(0)], TrainConfig(lr=1e-3, max_grad_norm=1e-3))
    assert free[0]["grad_norm"] == pytest.approx(tight[0]["grad_norm"])
    assert math.isfinite(free[0]["grad_norm"])


def test_only_the_factors_move(make_adapter: MakeAdapter) -> None:
    model = lora_model(make_adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, [make_batch(seed) for seed in range(3)], TrainConfig(lr=1e-2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 4
    assert all("lora_A" in name or "lora_B" in name for name in moved)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_loss_of_nan_names_the_step_and_is_not_learnt_from(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, grad_accum: int
) -> None:
    from gora_serve.training import loop

    model = lora_model(make_adapter)
    calls = []

    def sometimes_nan(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        loss = mean_loss(model, batch)
        return loss * math.nan if len(calls) == 2 * grad_accum + 1 else loss

    monkeypatch.setattr(loop, "mean_loss", sometimes_nan)
    batches = [make_batch(seed) for seed in range(4 * grad_accum)]
    with pytest.raises(RunError, match="GS-702") as caught:
        run(model, batches, TrainConfig(lr=1e-3, grad_accum=grad_accum))
    assert "training step 3 is nan" in caught.value.what
    assert all(p.isfinite().all() for p in model.parameters())


def test_evaluate_is_the_mean_over_all_tokens_and_restores_the_mode(make_adapter: MakeAdapter) -> None:
    model = lora_model(make_adapter).train()
    batches = [make_batch(0), make_batch(1, rows=4), make_batch(2, length=20)]
    total = sum(float(mean_loss(model, b).detach()) * int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    accelerator = Accelerator(cpu=True)
    found = evaluate(model, [lambda b=b: b for b in batches], accelerator=accelerator)
    assert found == pytest.approx(total / count, rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
