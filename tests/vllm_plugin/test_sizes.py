"""From the ranks of the served adapters to the sizes of buffers, and when the plugin stays away."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.errors import BindingError
from gora_serve.serving import plugin
from gora_serve.serving.plugin import (
    GROUP,
    PLUGIN,
    Declared,
    declare,
    dump_declared,
    load_declared,
    plugin_environment,
    why_stock,
)
from gora_serve.vllm_plugin.sizes import headroom_for, layer_of, parts_of, pool_room, pool_rows, slot_rank

Q, K, V = (f"model.layers.3.self_attn.{name}_proj" for name in "qkv")
DOWN = "model.layers.3.mlp.down_proj"
KNOWN = declare([{Q: 2, V: 9, DOWN: 32}, {Q: 12, V: 1}], headroom=0)

paths = st.lists(st.sampled_from(["model", "layers", "0", "11", "x1", "q_proj", "lm_head"]), min_size=1, max_size=5)
adapters = st.lists(st.dictionaries(paths.map(".".join), st.integers(1, 512), max_size=8), max_size=4)


@given(adapters, st.integers(0, 64))
def test_what_is_declared_arrives(ranks: list[dict[str, int]], headroom: int) -> None:
    declared = declare(ranks, headroom)
    assert load_declared(dump_declared(declared)) == declared
    for module, (largest, total) in declared.modules.items():
        found = [adapter[module] for adapter in ranks if module in adapter]
        assert (largest, total) == (max(found), sum(found))


def test_a_pool_has_the_sum_of_the_ranks_of_each_slice() -> None:
    layer = "model.layers.3.self_attn.qkv_proj"
    assert pool_room(KNOWN, layer, 3, slots=3, max_rank=32) == (14, 0, 10)
    assert pool_room(KNOWN, DOWN, 1, slots=3, max_rank=32) == (32,)
    assert pool_room(KNOWN, "lm_head", 1, slots=3, max_rank=32) == (0,)
    assert pool_room(None, layer, 3, slots=3, max_rank=32) == (96, 96, 96)


def test_headroom_is_for_slots_that_no_adapter_has() -> None:
    known = declare([{Q: 2}, {Q: 12}], headroom=8)
    assert pool_room(known, Q, 1, slots=4, max_rank=16) == (14 + 2 * 8,)
    assert pool_room(known, Q, 1, slots=2, max_rank=16) == (14,)
    assert headroom_for(known, missing=5, slots=4) == 8 + 3
    for missing in range(1, 12):
        raised = dataclasses.replace(known, headroom=headroom_for(known, missing, slots=4))
        assert pool_room(raised, Q, 1, slots=4, max_rank=16)[0] >= 14 + 2 * 8 + missing


def test_stacked_buffers_have_the_largest_rank_of_their_slices() -> None:
    """At the ranks that vLLM's kernels are made for, and never below what it warms up with."""
    layer = "model.layers.3.self_attn.qkv_proj"
    assert slot_rank(KNOWN, layer, 3, max_rank=32) == 16
    assert slot_rank(KNOWN, DOWN, 1, max_rank=32) == 32
    assert slot_rank(KNOWN, "model.layers.4.mlp.down_proj", 1, max_rank=32) == 8
    assert slot_rank(KNOWN, "model.layers.4.mlp.down_proj", 1, max_rank=1) == 1
    assert slot_rank(declare([{Q: 2}], headroom=20), DOWN, 1, max_rank=32) == 32
    assert slot_rank(None, DOWN, 1, max_rank=32) == 32


def test_a_layer_that_is_not_split_is_known_by_its_own_name() -> None:
    assert parts_of("a.qkv_proj", 3) == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert parts_of("a.qkv_proj", 1) == ("a.qkv_proj",)
    assert parts_of("gate_up_proj", 2) == ("gate_proj", "up_proj")


def test_a_projection_is_a_slice_of_its_layer() -> None:
    assert layer_of(Q) == ("model.layers.3.self_attn.qkv_proj", 3)
    assert layer_of("up_proj") == ("gate_up_proj", 2)
    assert layer_of(DOWN) == (DOWN, 1)
    for module in (Q, K, V, DOWN, "lm_head"):
        assert module in parts_of(*layer_of(module))
    assert [pool_rows(KNOWN, module, 3, 32) for module in (Q, K, V, DOWN)] == [14, 0, 10, 32]
    assert pool_rows(None, K, 3, 32) == 96


@pytest.mark.parametrize("text", ["{", "[]", '{"adapters":1,"headroom":0,"modules":{"a":{"":[1]}}}', '{"adapters":-1}'])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BindingError) as caught:
        load_declared(text)
    assert caught.value.code == "GS-4803"


def test_ranks_that_no_variable_can_hold_are_left_out() -> None:
    many = Declared(1, 0, {f"{'x' * 100}{name}": (1, 1) for name in "abcdefgh"})
    assert plugin.RANKS in plugin_environment(many)
    long = Declared(1, 0, {f"{'x' * 100}{'y' * number}": (1, 1) for number in range(1000)})
    assert plugin.RANKS not in plugin_environment(long)
    assert plugin_environment(long)[plugin.SWITCH] == "1"


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0"])
def test_other_versions_run_as_they_are(version: str) -> None:
    assert "tested with vLLM 0.32 only" in str(why_stock(version))


@pytest.mark.parametrize("registered", [True, False])
def test_an_installation_without_the_entry_point_is_told(monkeypatch: pytest.MonkeyPatch, registered: bool) -> None:
    points = [SimpleNamespace(name=PLUGIN)] if registered else []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == GROUP else [])
    assert (why_stock("0.32.1+cpu") is None) == registered


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
def test_workers_of_ray_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM copies its own variables to them, and those that it is asked to."""
    ray_env = pytest.importorskip("vllm.ray.ray_env", reason="vLLM is not installed")
    for name, value in plugin_environment(KNOWN).items():
        monkeypatch.setenv(name, value)
    assert {plugin.SWITCH, plugin.RANKS, "VLLM_PLUGINS"} <= ray_env.get_env_vars_to_copy()
