"""The sum that a layer adds, by every scheme, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import WIDE, Batch, batches, right_sum

from gora_serve.vllm_plugin import dense, packed, prepared, product
from gora_serve.vllm_plugin import kernel as layout
from gora_serve.vllm_plugin.pool import RankPool
from gora_serve.vllm_plugin.product import add_embedding, add_linear
from gora_serve.vllm_plugin.route import make_route

# (MANY, FEW): side by side or by adapter; 16-bit products as they are, or in float32
SCHEMES = {"side by side": (10**6, 0), "converted": (10**6, 10**6), "by adapter": (0, 0), "as it is": (150, 32)}
PACKED = ("side by side", "by adapter", "prepared")
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


@contextmanager
def scheme(name: str) -> Iterator[None]:
    most, few = SCHEMES.get(name, SCHEMES["as it is"])
    with pytest.MonkeyPatch.context() as patch:
        for many in ("MANY", "MANY_16_BIT", "MANY_PACKED"):
            patch.setattr(product, many, most)
        patch.setattr(dense, "FEW", few)
        patch.setattr(product, "FEW", prepared.FEW if name == "prepared" else 0)
        yield


def added(batch: Batch, pool: RankPool, scale: float = 1.0) -> torch.Tensor:
    y = batch.y.clone()
    add_linear(y, batch.x, pool, make_route(torch.tensor(batch.slots)), scale)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_token_gets_its_own_adapter(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    batch = data.draw(batches(dtype))
    scale = data.draw(st.sampled_from([1.0, 0.25]))
    with scheme(name):
        found = added(batch, batch.pool(spare=data.draw(st.integers(0, 3))), scale)
    check(batch, found, scale)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("chunk", [16, 256])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_token_gets_its_own_adapter_from_packed_weights(name: str, chunk: int, data: st.DataObject) -> None:
    kernel()
    batch = data.draw(batches(torch.bfloat16, step=layout.BLOCK))
    scale = data.draw(st.sampled_from([1.0, 0.25]))
    with scheme(name), pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "CHUNK", chunk)
        found = added(batch, batch.pool(packed=True), scale)
    check(batch, found, scale)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_packed_sums_of_whole_numbers_are_exact(name: str, data: st.DataObject) -> None:
    """h is at most 24, and sums of such numbers are exact in float32: one wrong rank would show."""
    kernel()
    batch = data.draw(batches(torch.bfloat16, step=layout.BLOCK, whole=True))
    with scheme(name):
        found = added(batch, batch.pool(packed=True))
    expected, _ = right_sum(batch)
    assert torch.equal(found, expected.to(torch.bfloat16))


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prepared_sums_are_those_of_the_step_at_hand(data: st.DataObject) -> None:
    """Two layers of the same sizes take turns; tokens change places, adapters go and others take their slots."""
    kernel()
    batch = data.draw(batches(torch.bfloat16, step=layout.BLOCK, whole=True))
    held = [dict(batch.adapters), {slot: pairs for slot, pairs in batch.adapters.items() if slot % 2}]
    pools = [replace(batch, adapters=adapters).pool(packed=True) for adapters in held]
    slots = batch.slots[: prepared.FEW]
    for number in range(8):
        which, tokens = number % 2, data.draw(st.permutations(slots))
        if number > 3 and held[which] and data.draw(st.booleans()):
            pools[which].remove(gone := data.draw(st.sampled_from(sorted(held[which]))))
            del held[which][gone]
        x = torch.randint(-1, 2, (len(tokens), WIDE)).bfloat16()
        step = Batch(held[which], tuple(tokens), batch.outs, x, torch.zeros(len(tokens), sum(batch.outs)).bfloat16())
        with torch.inference_mode(mode=data.draw(st.booleans())):
            found = added(step, pools[which])
        assert torch.equal(found, right_sum(step)[0].to(torch.bfloat16))


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
@pytest.mark.parametrize(("rows", "out"), [(2, 32), (4, 32), (3, 64)])
def test_prepared_sums_look_at_what_they_are_given(rows: int, out: int) -> None:
    """The kernel would read and write beyond what is prepared."""
    kernel()
    pool = RankPool([2], WIDE, [32], torch.bfloat16, packed=True)
    pool.put(0, [(torch.randn(2, WIDE), torch.randn(32, 2))])
    y, route = torch.zeros(3, out).bfloat16(), make_route(torch.tensor([0, 0, -1]))
    with pytest.raises(ValueError, match=r"prepared|columns"):
        add_linear(y, torch.zeros(rows, WIDE).bfloat16(), pool, route)
    assert not y.any()


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
@pytest.mark.parametrize("fault", ["wrong", "raised"])
def test_a_kernel_that_is_not_right_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel()

    def product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        if fault == "raised":
            raise RuntimeError("not implemented")
        out.fill_(1)

    layout._multiplies.cache_clear()
    monkeypatch.setattr(layout, "multiply", product)
    try:
        assert not layout.can_pack(WIDE, [32], torch.bfloat16, "cpu")
    finally:
        layout._multiplies.cache_clear()


def kernel() -> None:
    """Bring in vLLM's kernels, or skip the test where this processor has none for packed bfloat16."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not layout.has_kernel():
        pytest.skip("no kernel for packed bfloat16 on this processor")


def check(batch: Batch, found: torch.Tensor, scale: float) -> None:
    expected, size = right_sum(batch, scale)
    assert bool(((found.double() - expected).abs() <= 4 * EPSILON[batch.y.dtype] * size + 1e-30).all())
    bare = torch.tensor([slot not in batch.adapters for slot in batch.slots])
    assert torch.equal(found[bare], batch.y[bare])


@pytest.mark.parametrize("name", SCHEMES)
def test_the_comparison_can_fail(name: str) -> None:
    """The sum with another token's adapter is far outside of the tolerance."""
    torch.manual_seed(0)
    adapters = {slot: [(torch.randn(4, WIDE), torch.randn(6, 4))] for slot in (0, 1)}
    batch = Batch(adapters, (0, 1, -1), (6,), torch.randn(3, WIDE), torch.randn(3, 6))
    other = Batch(adapters, (1, -1, 0), (6,), batch.x, batch.y)
    with scheme(name):
        found = added(batch, batch.pool())
    expected, size = right_sum(other)
    assert bool(((found.double() - expected).abs() > 100 * EPSILON[torch.float32] * size).any(1).all())


def test_a_token_of_infinities_stays_alone() -> None:
    """What one request computes is nobody else's, not even where it is not a number."""
    torch.manual_seed(0)
    adapters = {slot: [(torch.randn(3, WIDE), torch.randn(6, 3))] for slot in (0, 1)}
    x = torch.randn(3, WIDE)
    x[0] = float("inf")
    alone(Batch(adapters, (0, 1, -1), (6,), x, torch.randn(3, 6)), packed=False)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
def test_a_token_of_infinities_stays_alone_with_packed_weights() -> None:
    kernel()
    torch.manual_seed(0)
    adapters = {slot: [(torch.randn(3, WIDE).bfloat16(), torch.randn(32, 3).bfloat16())] for slot in (0, 1)}
    x = torch.randn(3, WIDE).bfloat16()
    x[0] = float("inf")
    alone(Batch(adapters, (0, 1, -1), (32,), x, torch.randn(3, 32).bfloat16()), packed=True)


def alone(batch: Batch, *, packed: bool) -> None:
    for name in PACKED if packed else SCHEMES:
        with scheme(name):
            found = added(batch, batch.pool(packed=packed))
        assert not found[0].isfinite().any()
        assert found[1:].isfinite().all()
        assert torch.equal(found[2], batch.y[2])


def test_adapters_that_are_not_in_the_batch_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pool = RankPool([6], WIDE, [5], torch.float32)
    for slot in (0, 1, 2):
        pool.put(slot, [(torch.randn(2, WIDE), torch.randn(5, 2))])
    for part in pool.store.part(1, 0):
        part[:] = float("nan")
    for name in SCHEMES:
        with scheme(name):
            y = torch.zeros(4, 5)
            add_linear(y, torch.randn(4, WIDE), pool, make_route(torch.tensor([0, 2, -1, 2])))
        assert y.isfinite().all()


def test_embeddings_take_the_columns_of_their_tokens() -> None:
    torch.manual_seed(0)
    pool = RankPool([5], 30, [8], torch.float32)
    first, second = (torch.randn(2, 30), torch.randn(8, 2)), (torch.randn(3, 30), torch.randn(8, 3))
    pool.put(0, [first])
    pool.put(4, [second])
    tokens = torch.tensor([7, 7, 29, 0])
    y = torch.zeros(4, 8)
    add_embedding(y, tokens, pool, make_route(torch.tensor([4, -1, 0, 4])))
    expected = torch.stack(
        [second[1] @ second[0][:, 7], torch.zeros(8), first[1] @ first[0][:, 29], second[1] @ second[0][:, 0]]
    )
    torch.testing.assert_close(y, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40))
def test_routes_group_every_token_once(slots: list[int]) -> None:
    route = make_route(torch.tensor(slots))
    numbers = torch.arange(len(slots))
    assert {slot: numbers[tokens].tolist() for slot, tokens in route.groups.items()} == {
        slot: [token for token, one in enumerate(slots) if one == slot] for slot in sorted({*slots} - {-1})
    }
    assert route.alone == (len(set(slots)) == 1 and slots[0] >= 0)


def test_packed_rows_look_at_what_they_are_given() -> None:
    """The kernel would write beyond a narrower y; and columns of packed rows cannot be picked by token."""
    pool = RankPool([2], WIDE, [32], torch.bfloat16, packed=True)
    pool.put(0, [(torch.randn(2, WIDE), torch.randn(32, 2))])
    found = pool.select((0,))
    assert found is not None
    for out in (16, 64):
        with pytest.raises(ValueError, match="columns"):
            found.grow(torch.zeros(3, out).bfloat16(), torch.zeros(3, 16).bfloat16(), 1.0)
    with pytest.raises(TypeError, match="packed"):
        add_embedding(torch.zeros(1, 32).bfloat16(), torch.tensor([0]), pool, make_route(torch.tensor([0])))
