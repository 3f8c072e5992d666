"""A pool keeps what each slot was given, whatever comes and goes, in the room that it has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import WIDE

from gora_serve.errors import BindingError
from gora_serve.vllm_plugin.pool import RankPool

OUTS = (5, 3)


def pairs(seed: int, ranks: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, WIDE, generator=generator), torch.randn(out, rank, generator=generator)) if rank else None
        for rank, out in zip(ranks, OUTS, strict=True)
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(0, 4)))),
        max_size=12,
    )
)
def test_a_pool_holds_what_it_was_given(steps: list[tuple[int, tuple[int, int] | None]]) -> None:
    pool, held = RankPool([16, 16], WIDE, OUTS, torch.float32), {}
    for seed, (slot, ranks) in enumerate(steps):
        if ranks is None:
            pool.remove(slot)
            held.pop(slot, None)
        else:
            held[slot] = pairs(seed, ranks)
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
        assert not pool.B[index][ranks_held:].any()


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


@pytest.mark.parametrize("where", [0, 1])
def test_values_that_are_not_finite_are_refused(where: int) -> None:
    """Beside others, a NaN in B would spread to their tokens; 1e6 is one in float16."""
    pool = RankPool([4], WIDE, [5], torch.float16)
    pair = [torch.randn(2, WIDE), torch.randn(5, 2)]
    pair[where][0, 0] = 1e6
    with pytest.raises(BindingError, match="not finite") as caught:
        pool.put(0, [(pair[0], pair[1])])
    assert caught.value.code == "GS-4802"
    assert pool.rank(0) == (0,)


def test_bytes_are_those_of_the_ranks() -> None:
    pool = RankPool([7, 2], WIDE, OUTS, torch.bfloat16)
    assert pool.nbytes == 2 * (7 * (WIDE + 5) + 2 * (WIDE + 3))
