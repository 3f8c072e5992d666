"""LoRA layers on a model: what is attached comes out again, and trying a γ leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import MakeAdapter, build_gpt2, build_llama, llama_shapes

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.config import RankConfig
from gora_serve.gora.ranks import RankPlan, uniform_ranks
from gora_serve.training import inject

TOKENS = torch.arange(3, 43).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def edited(adapter: Adapter, factor: float = 1.0) -> torch.Tensor:
    """Logits of the base with factor * delta written into its weights."""
    model = build_llama()
    for path, factors in adapter.modules.items():
        weight = model.get_submodule(path).weight
        delta = factor * factors.scale * (factors.B.double() @ factors.A.double())
        weight.data = (weight.double() + delta).float()
    return logits(model)


def attached(adapter: Adapter, base: Any = None) -> Any:
    model = inject.attach(
        base or build_llama(), adapter.modules, task_type="CAUSAL_LM", fan_in_fan_out=adapter.fan_in_fan_out
    )
    return model.eval()


def test_attach_and_extract_are_inverse(tiny_adapter: Adapter) -> None:
    base = BaseId("tiny", "abc")
    back = inject.extract(
        attached(tiny_adapter), base=base, origin={"method": "gora"}, task_type="CAUSAL_LM", fan_in_fan_out=False
    )
    assert (back.base, back.origin, back.ranks) == (base, {"method": "gora"}, tiny_adapter.ranks)
    for path, factors in tiny_adapter.modules.items():
        assert torch.equal(back.modules[path].A, factors.A)
        assert torch.equal(back.modules[path].B, factors.B)
        assert back.modules[path].scale == factors.scale


def test_the_extracted_adapter_is_a_copy(tiny_adapter: Adapter) -> None:
    model = attached(tiny_adapter)
    back = inject.extract(model, base=BaseId("x"), origin={}, task_type=None, fan_in_fan_out=False)
    inject.multiply_B(model, 0.0)
    assert all(factors.B.any() for factors in back.modules.values())


def test_the_attached_model_computes_the_update(tiny_adapter: Adapter) -> None:
    torch.testing.assert_close(logits(attached(tiny_adapter)), edited(tiny_adapter), rtol=1e-5, atol=1e-4)


def test_only_factors_are_trainable_and_in_float32(tiny_adapter: Adapter) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = attached(tiny_adapter, build_llama().to(dtype))
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trainable) == 2 * len(tiny_adapter.modules)
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        assert {p.dtype for name, p in model.named_parameters() if name not in trainable} == {dtype}


@pytest.mark.parametrize("factor", [0.0, 0.25, -1.0])
def test_scaled_counts_every_update_by_the_factor(tiny_adapter: Adapter, factor: float) -> None:
    model = attached(tiny_adapter)
    before = logits(model)
    with inject.scaled(model, factor):
        inside = logits(model)
    torch.testing.assert_close(inside, edited(tiny_adapter, factor), rtol=1e-5, atol=1e-4)
    assert torch.equal(logits(model), before)


def test_scaled_restores_when_the_loss_fails(tiny_adapter: Adapter) -> None:
    model = attached(tiny_adapter)
    before = {path: layer.scaling["default"] for path, layer in inject.lora_layers(model).items()}
    with pytest.raises(RuntimeError, match="out of memory"), inject.scaled(model, 0.0):
        raise RuntimeError("out of memory")
    assert {path: layer.scaling["default"] for path, layer in inject.lora_layers(model).items()} == before
    assert set(before.values()) != {0.0}


def test_multiply_b_fixes_what_scaled_tried(tiny_adapter: Adapter) -> None:
    model = attached(tiny_adapter)
    inject.multiply_B(model, 0.3)
    torch.testing.assert_close(logits(model), edited(tiny_adapter, 0.3), rtol=1e-5, atol=1e-4)


def test_detach_gives_the_base_back_bit_for_bit(tiny_adapter: Adapter) -> None:
    before = {name: tensor.clone() for name, tensor in build_llama().state_dict().items()}
    model = attached(tiny_adapter)
    logits(model)
    after = inject.detach(model).state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_conv1d_modules(make_adapter: MakeAdapter) -> None:
    path = "transformer.h.0.attn.c_attn"
    adapter = make_adapter({path: 3}, shapes={path: (96, 32)}, fan_in_fan_out=True)
    reference = build_gpt2()
    factors = adapter.modules[path]
    weight = reference.get_submodule(path).weight
    weight.data = (weight.double() + factors.scale * (factors.B.double() @ factors.A.double()).T).float()
    torch.testing.assert_close(logits(attached(adapter, build_gpt2())), logits(reference), rtol=1e-5, atol=1e-5)


def test_many_modules_whose_names_end_alike_get_their_own_ranks(make_adapter: MakeAdapter) -> None:
    """From 20 modules on PEFT shortens target lists to common endings; each module must keep its own rank."""
    torch.manual_seed(0)
    model = build_llama(num_hidden_layers=12)
    shapes = {p.replace("layers.0", f"layers.{i}"): s for p, s in llama_shapes().items() for i in range(12)
              if "layers.0" in p}  # fmt: skip
    ranks = {path: 1 + index % 5 for index, path in enumerate(sorted(shapes))}
    adapter = make_adapter(ranks, shapes=shapes)
    found = inject.lora_layers(attached(adapter, model))
    assert {path: layer.r["default"] for path, layer in found.items()} == ranks


def test_lora_starts_at_zero_with_alpha_over_r() -> None:
    plan = uniform_ranks(llama_shapes(), RankConfig(rank=4))
    factors = inject.lora_factors(plan, alpha=16.0, generator=torch.Generator().manual_seed(0))
    assert {path: f.rank for path, f in factors.items()} == dict.fromkeys(llama_shapes(), 4)
    assert all(f.scale == 4.0 and not f.B.any() and f.A.any() for f in factors.values())
    assert all(f.shape == llama_shapes()[path] for path, f in factors.items())


def test_lora_leaves_modules_of_rank_0_out() -> None:
    plan = RankPlan("file", 4, 0, 4, {"a": 4, "b": 0}, {"a": (8, 8), "b": (8, 8)})
    factors = inject.lora_factors(plan, alpha=16.0, generator=torch.Generator().manual_seed(0))
    assert {path: f.rank for path, f in factors.items()} == {"a": 4}


def test_factors_are_values() -> None:
    with pytest.raises(AttributeError):
        LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0).scale = 2.0  # type: ignore[misc]
