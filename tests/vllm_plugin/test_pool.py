"""A pool keeps what each slot was given, whatever comes and goes, in the room that it has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import WIDE

from gora_serve.errors import BindingError
from gora_serve.vllm_plugin.dense import DenseStore
from gora_serve.vllm_plugin.kernel import can_pack, has_kernel, pack_outputs, unpack_outputs
from gora_serve.vllm_plugin.pool import RankPool

OUTS = (5, 3)
BLOCKS = (64, 32)  # outputs that can be packed


def pairs(
    seed: int, ranks: tuple[int, int], outs: tuple[int, int] = OUTS, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [(values(rank, WIDE), values(out, rank)) if rank else None for rank, out in zip(ranks, outs, strict=True)]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.one_of(st.none(), st.tuples(st.integers(0, 20), st.integers(0, 20)))),
        max_size=12,
    )
)
def test_a_pool_holds_what_it_was_given(packed: bool, steps: list[tuple[int, tuple[int, int] | None]]) -> None:
    outs, dtype = (BLOCKS, torch.bfloat16) if packed else (OUTS, torch.float32)
    pool, held = RankPool([80, 80], WIDE, outs, dtype, packed=packed), {}
    for seed, (slot, ranks) in enumerate(steps):
        if ranks is None:
            pool.remove(slot)
            held.pop(slot, None)
        else:
            held[slot] = pairs(seed, ranks, outs, dtype)
            pool.put(slot, held[slot])
    for slot in range(4):
        for index in range(len(OUTS)):
            given_pair, found = held.get(slot, [None, None])[index], pool.part(slot, index)
            assert (given_pair is None) == (found is None)
            if given_pair is not None and found is not None:
                assert torch.equal(found[0], given_pair[0])
                assert torch.equal(found[1], given_pair[1].t())
    for index in range(len(OUTS)):
        ranks_held = sum(pair[index][0].shape[0] for pair in held.values() if pair[index] is not None)
        assert pool.used(index) == ranks_held
        if isinstance(pool.store, DenseStore):
            assert not pool.store.B[index][ranks_held:].any()


def test_ranks_of_zeros_take_no_room() -> None:
    """An adapter that is padded to one rank, and those of zeros that vLLM warms up with."""
    a, b = torch.randn(4, WIDE), torch.randn(5, 4)
    a[2:], b[:, 1:] = 0, 0
    pool = RankPool([1, 0], WIDE, OUTS, torch.float32)
    pool.put(0, [(a, b), (torch.zeros(8, WIDE), torch.zeros(3, 8))])
    assert pool.rank(0) == (1, 0)
    found = pool.part(0, 0)
    assert found is not None
    torch.testing.assert_close(found[1].t() @ found[0], b @ a)


def test_an_adapter_that_does_not_fit_is_refused_whole() -> None:
    pool = RankPool([4, 4], WIDE, OUTS, torch.float32, name="model.layers.0.mlp.gate_up_proj")
    pool.put(0, pairs(0, (2, 2)))
    with pytest.raises(BindingError, match="does not fit into this layer") as caught:
        pool.put(1, pairs(1, (2, 3)))
    assert caught.value.code == "GS-4801"
    assert caught.value.fields["tensor"] == "model.layers.0.mlp.gate_up_proj"
    assert pool.rank(1) == (0, 0)
    pool.put(1, pairs(1, (2, 2)))
    pool.put(0, pairs(2, (1, 2)))  # in place of its own
    assert pool.rank(0) == (1, 2)


def test_bytes_are_those_of_the_ranks() -> None:
    pool = RankPool([7, 2], WIDE, OUTS, torch.bfloat16)
    assert pool.nbytes == pool.store.held_bytes == 2 * (7 * (WIDE + 5) + 2 * (WIDE + 3))


def test_packed_bytes_are_those_of_the_ranks_filled_up() -> None:
    """A to 16 rows in all, each adapter's B to an even number."""
    pool = RankPool([7, 2], WIDE, BLOCKS, torch.bfloat16, packed=True)
    assert pool.store.held_bytes == 0
    pool.put(0, pairs(0, (3, 2), BLOCKS, torch.bfloat16))
    pool.put(1, pairs(1, (4, 0), BLOCKS, torch.bfloat16))
    assert pool.store.held_bytes == 2 * (16 * WIDE + (4 + 4) * 64 + 2 * 32)
    pool.remove(0)
    assert pool.store.held_bytes == 2 * (16 * WIDE + 4 * 64)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
def test_the_layout_is_that_of_vllm() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not has_kernel():
        pytest.skip("no kernel for packed bfloat16 on this processor")
    for rows in (16, 32, 48, 80):
        weight = torch.randn(rows, 64).bfloat16()
        assert torch.equal(pack_outputs(weight), torch.ops._C.convert_weight_packed(weight).view(-1))
        assert torch.equal(unpack_outputs(pack_outputs(weight), 64), weight)


def test_factors_of_another_base_are_refused() -> None:
    """Not cut to size: vLLM gives those of the head to the pool without a look at their shapes."""
    for packed in (False, True):
        pool = RankPool([4], WIDE, [32], torch.bfloat16, packed=packed, name="lm_head")
        pool.put(1, [(torch.randn(2, WIDE), torch.randn(32, 2))])
        kept = [part.clone() for part in pool.store.part(1, 0)]
        for a, b in (((2, WIDE + 2), (32, 2)), ((2, WIDE), (64, 2)), ((1, WIDE), (32, 2))):
            with pytest.raises(BindingError, match="another base") as caught:
                pool.put(0, [(torch.randn(a), torch.randn(b))])
            assert caught.value.code == "GS-4804"
            assert caught.value.fields["tensor"] == "lm_head"
        assert pool.rank(0) == (0,)
        assert all(torch.equal(*pair) for pair in zip(pool.store.part(1, 0), kept, strict=True))


@pytest.mark.parametrize(
    ("wide", "outs", "dtype"),
    [(WIDE + 1, [32], torch.bfloat16), (WIDE, [32, 40], torch.bfloat16), (WIDE, [32], torch.float16)],
)
def test_what_the_layout_does_not_fit_is_not_packed(wide: int, outs: list[int], dtype: torch.dtype) -> None:
    assert not can_pack(wide, outs, dtype, "cpu")
    with pytest.raises(ValueError, match="cannot be packed"):
        RankPool([4] * len(outs), wide, outs, dtype, packed=True)
