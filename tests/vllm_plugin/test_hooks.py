"""vLLM's own wrapper and layers, as they are and with the plugin: these import vLLM into this process."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import WIDE, Batch, right_sum

from gora_serve.errors import BindingError
from gora_serve.serving.plugin import RANKS, SWITCH, declare, dump_declared
from gora_serve.vllm_plugin.pool import PooledStack

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),  # of vLLM and what it imports
]
OUTS = (6, 4)
IDS = {"first": 11, "second": 12}
SLOTS = [11, None, 12]  # the adapters of slots 0 and 2; the last slot is taken


@pytest.fixture(scope="module", autouse=True)
def vllm() -> Any:
    return pytest.importorskip("vllm", reason="vLLM is not installed")


def wrapper(kind: str, tokens: list[int]) -> Any:
    """Return vLLM's wrapper, or the plugin's, told which token has which adapter (0: none)."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from gora_serve.vllm_plugin.punica import PooledPunicaWrapper

    made = (PunicaWrapperCPU if kind == "stock" else PooledPunicaWrapper)(64, max_batches=16, device="cpu")
    made.update_metadata(LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=True), SLOTS, 4, 100)
    return made


def example() -> tuple[Batch, list[int]]:
    torch.manual_seed(0)
    adapters = {
        slot: [(torch.randn(rank, WIDE), torch.randn(out, rank)) for rank, out in zip(ranks, OUTS, strict=True)]
        for slot, ranks in {0: (2, 3), 2: (4, 1)}.items()
    }
    slots = (0, 0, -1, 2, -1, 0, 2)
    x, y = torch.randn(len(slots), WIDE), torch.randn(len(slots), sum(OUTS))
    return Batch(adapters, slots, OUTS, x, y), [SLOTS[slot] or 0 if slot >= 0 else 0 for slot in slots]


def stacks(batch: Batch) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """vLLM's buffers: 3 slots, every rank padded to 4."""
    a = tuple(torch.zeros(3, 1, 4, WIDE) for _ in OUTS)
    b = tuple(torch.zeros(3, 1, out, 4) for out in OUTS)
    for slot, pairs in batch.adapters.items():
        for index, pair in enumerate(pairs):
            assert pair is not None
            rank = pair[0].shape[0]
            a[index][slot, 0, :rank], b[index][slot, 0, :, :rank] = pair
    return a, b


def test_vllm_gives_tokens_without_an_adapter_the_last_slots() -> None:
    """What the plugin is there for; when this fails, vLLM has mended it."""
    batch, tokens = example()
    y = batch.y.clone()
    wrapper("stock", tokens).add_lora_linear(y, batch.x, *stacks(batch), 1.0, OUTS)
    expected, _ = right_sum(batch)
    wrong, _ = right_sum(Batch(batch.adapters, tuple(2 if slot < 0 else slot for slot in batch.slots), *_rest(batch)))
    bare = torch.tensor(batch.slots) < 0
    torch.testing.assert_close(y[~bare].double(), expected[~bare], rtol=1e-4, atol=1e-4)
    assert (y[bare].double() - expected[bare]).abs().max() > 1
    torch.testing.assert_close(y[bare].double(), wrong[bare], rtol=1e-4, atol=1e-4)


def _rest(batch: Batch) -> tuple[Any, ...]:
    return batch.outs, batch.x, batch.y


@pytest.mark.parametrize("buffers", ["pool", "stacked"])
def test_with_the_plugin_they_stay_as_they_are(buffers: str) -> None:
    """Also in layers whose buffers stay vLLM's own."""
    batch, tokens = example()
    y = batch.y.clone()
    a, b = stacks(batch)
    if buffers == "pool":
        a = PooledStack(a)
        a.pool = batch.pool()
    wrapper("plugin", tokens).add_lora_linear(y, batch.x, a, b, 1.0, OUTS)
    expected, _ = right_sum(batch)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    bare = torch.tensor(batch.slots) < 0
    assert torch.equal(y[bare], batch.y[bare])


def test_before_vllm_has_told_there_is_no_adapter() -> None:
    from gora_serve.vllm_plugin.punica import PooledPunicaWrapper

    batch, _ = example()
    stack = PooledStack(stacks(batch)[0])
    stack.pool = batch.pool()
    y = batch.y.clone()
    PooledPunicaWrapper(64, max_batches=16, device="cpu").add_lora_linear(y, batch.x, stack, (), 1.0, OUTS)
    assert torch.equal(y, batch.y)


def test_padded_batches_have_no_adapter_beyond_their_tokens() -> None:
    batch, tokens = example()
    stack = PooledStack(stacks(batch)[0])
    stack.pool = batch.pool()
    x, y = torch.cat([batch.x, torch.randn(3, WIDE)]), torch.zeros(len(tokens) + 3, sum(OUTS))
    wrapper("plugin", tokens).add_lora_linear(y, x, stack, (), 1.0, OUTS)
    assert not y[len(tokens) :].any()
    assert y[0].any()


def made_layer(kind: str, config: Any) -> Any:
    """A gate and up layer of 2 slots with LoRA, its buffers as `kind` has them."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    base = MergedColumnParallelLinear(WIDE, [6, 6], bias=False, prefix="model.layers.0.mlp.gate_up_proj")
    layer = MergedColumnParallelLinearWithLoRA(base)
    from gora_serve.vllm_plugin import hooks

    create = {"pool": hooks._create_pool, "sized": hooks._create_sized}[kind]
    create(MergedColumnParallelLinearWithLoRA.create_lora_weights)(layer, 2, config)
    return layer


@pytest.fixture
def lora_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Rank 16 at most; two adapters are declared, of ranks 2 and 5 in gate and 3 in up of one of them."""
    from gora_serve.vllm_plugin.sizes import declared

    gate, up = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
    monkeypatch.setenv(RANKS, dump_declared(declare([{gate: 2}, {gate: 5, up: 3}], 0)))
    declared.cache_clear()
    yield SimpleNamespace(max_lora_rank=16, fully_sharded_loras=False, lora_dtype=torch.float32)
    declared.cache_clear()


def test_buffers_have_the_ranks_of_their_layer(vllm_layers: None, lora_config: Any) -> None:
    pooled, sized = made_layer("pool", lora_config), made_layer("sized", lora_config)
    assert pooled.lora_a_stacked.pool.room == (7, 3)
    assert [tuple(part.shape) for part in sized.lora_a_stacked] == [(2, 1, 8, WIDE)] * 2
    assert [tuple(part.shape) for part in sized.lora_b_stacked] == [(2, 1, 6, 8)] * 2
    assert lora_config.max_lora_rank == 16


def test_vllm_fills_a_pool(vllm_layers: None, lora_config: Any) -> None:
    """Through its own code, which knows packed layers; a slice may be absent."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA

    from gora_serve.vllm_plugin import hooks

    layer = made_layer("pool", lora_config)
    a, b = torch.randn(5, WIDE), torch.randn(6, 5)
    hooks._set_linear(MergedColumnParallelLinearWithLoRA.set_lora)(layer, 1, [a, None], [b, None])
    found = layer.lora_a_stacked.pool.part(1, 0)
    assert torch.equal(found[0], a)
    assert torch.equal(found[1], b.t())
    assert layer.lora_a_stacked.pool.rank(1) == (5, 0)


@pytest.mark.parametrize("plugin", [False, True], ids=["vLLM", "plugin"])
def test_a_classification_head_keeps_its_own_buffers(vllm_layers: None, lora_config: Any, plugin: bool) -> None:
    """Its rows are the requests; one without an adapter must not get that of the last slot."""
    from vllm.lora.layers import ClassificationHeadWithLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from gora_serve.vllm_plugin import hooks

    torch.manual_seed(0)
    layer = ClassificationHeadWithLoRA(ReplicatedLinear(WIDE, 5, bias=False, return_bias=False, prefix="score"))
    weight = layer.base_layer.weight.data.normal_().clone()
    layer.base_layer.quant_method.process_weights_after_loading(layer.base_layer)
    lora_config.max_lora_cls_labels = None
    with pytest.MonkeyPatch.context() as patch:
        if plugin:
            for name, make in {"create_lora_weights": hooks._create_pool, "set_lora": hooks._set_linear}.items():
                stock = BaseLinearLayerWithLoRA.__dict__[name]
                patch.setattr(BaseLinearLayerWithLoRA, name, make(stock))
        layer.create_lora_weights(3, lora_config)
        pairs = {slot: (torch.randn(4, WIDE), torch.randn(5, 4)) for slot in (0, 2)}
        for slot, pair in pairs.items():
            layer.set_lora(slot, *pair)
    layer.set_mapping(wrapper("plugin" if plugin else "stock", [IDS["first"], 0, IDS["second"]]))
    layer.set_output_mapping((0, -1, 2))
    x = torch.randn(3, WIDE)
    found = layer(x)
    expected = x @ weight.t()
    for row, slot in {0: 0, 2: 2}.items():
        a, b = pairs[slot]
        expected[row] += b @ (a @ x[row])
    right = [bool((found[row] - expected[row]).abs().max() < 1e-4) for row in range(3)]
    assert right == [True, plugin, True]


def adapter(number: int, gate: int, up: int) -> Any:
    loras = {
        f"model.layers.0.mlp.{name}": SimpleNamespace(lora_a=torch.zeros(rank, WIDE))
        for name, rank in (("gate_proj", gate), ("up_proj", up))
        if rank
    }
    return SimpleNamespace(id=number, loras=loras)


@pytest.mark.parametrize(
    ("kind", "rank", "advice"),
    [("pool", 6, "with this adapter among the others, or with one slot more (-- --max-loras)"),
     ("sized", 9, "with --rank-headroom 9")],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_with_the_number_to_raise(
    vllm_layers: None, lora_config: Any, kind: str, rank: int, advice: str
) -> None:
    """Five ranks of gate are held: of the pool's 7 rows 2 are free, and no slot is left for later ones."""
    from gora_serve.vllm_plugin.fit import check_fit

    name = "model.layers.0.mlp.gate_up_proj"
    manager = SimpleNamespace(
        modules={name: made_layer(kind, lora_config)}, capacity=3, lora_slots=2,
        packed_modules={name: ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]},
        list_adapters=lambda: {1: adapter(1, 5, 3)},
    )  # fmt: skip
    check_fit(manager, adapter(2, 2, 0), "small")
    check_fit(manager, adapter(1, 6 if kind == "pool" else 8, 3), "in its own place")
    with pytest.raises(BindingError, match="the adapter large does not fit") as caught:
        check_fit(manager, adapter(2, rank, 0), "large")
    assert caught.value.code == "GS-4801"
    assert caught.value.fields["tensor"] == name
    assert caught.value.fields["try"] == f"start again {advice}"


def test_the_entry_point_does_nothing_unless_asked(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from gora_serve.vllm_plugin.register import WRAPPER, register

    kind = type(current_platform)
    before = kind.__dict__["get_punica_wrapper"]
    monkeypatch.delenv(SWITCH, raising=False)
    register()
    assert kind.__dict__["get_punica_wrapper"] is before
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    register()
    assert kind.__dict__["get_punica_wrapper"] is before
    monkeypatch.setattr(vllm, "__version__", "0.32.0+cpu")
    monkeypatch.setattr("gora_serve.vllm_plugin.hooks.install_pools", lambda: None)
    try:
        register()
        assert current_platform.get_punica_wrapper() == WRAPPER
    finally:
        kind.get_punica_wrapper = before
