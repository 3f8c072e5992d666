"""Rank allocation: equations 6 to 8 by hand, the laws of both rules by search, and the paper's own counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.config import RankConfig
from gora_serve.errors import InputError, UsageError
from gora_serve.gora.ranks import RankPlan, Shape, allocate_ranks, lora_parameters, uniform_ranks


def ranks_of(importances: Mapping[str, float], shapes: Mapping[str, Shape], **config: object) -> dict[str, int]:
    return dict(allocate_ranks(importances, shapes, RankConfig(**config)).ranks)  # type: ignore[arg-type]


def llama_8b_attention() -> dict[str, Shape]:
    """Llama-3.1-8B: 32 layers, hidden 4096, 8 of 32 heads for keys and values."""
    sizes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
    return {f"model.layers.{i}.self_attn.{name}": shape for i in range(32) for name, shape in sizes.items()}


def test_equal_shapes_by_hand() -> None:
    """Budget 2 * sqrt(200) * 8; shares 3/4 and 1/4: raw ranks 12 and 4."""
    shapes = {"a": (100, 100), "b": (100, 100)}
    assert ranks_of({"a": 3.0, "b": 1.0}, shapes, rank=8) == {"a": 12, "b": 4}


def test_unequal_shapes_by_hand() -> None:
    """sqrt(in + out) is 10 and 20. Budget 8 * 30 = 240; shares 1/4 and 3/4: 60/10 = 6 and 180/20 = 9."""
    shapes = {"small": (40, 60), "large": (300, 100)}
    assert ranks_of({"small": 1.0, "large": 3.0}, shapes, rank=8) == {"small": 6, "large": 9}


def test_rounding_is_to_the_nearest_integer() -> None:
    """Budget 2 * 20 * 8 = 320 over sqrt(400) = 20: raw ranks 16 * share."""
    shapes = {"a": (200, 200), "b": (200, 200)}
    assert ranks_of({"a": 0.65, "b": 0.35}, shapes, rank=8) == {"a": 10, "b": 6}  # raw 10.4 and 5.6


def test_bounds_clip_and_default_to_half_and_four_times_the_rank() -> None:
    shapes = dict.fromkeys("abcdefgh", (200, 200))
    importances = dict.fromkeys(shapes, 1e-6) | {"a": 1.0}
    assert ranks_of(importances, shapes, rank=8) == dict.fromkeys(shapes, 4) | {"a": 32}
    assert ranks_of(importances, shapes, rank=8, rank_min=2, rank_max=20) == dict.fromkeys(shapes, 2) | {"a": 20}


def test_rank_min_0_leaves_modules_out() -> None:
    shapes = {"a": (64, 64), "b": (64, 64)}
    assert ranks_of({"a": 1.0, "b": 0.0}, shapes, rank=8, rank_min=0) == {"a": 16, "b": 0}


@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_importances_of_0_give_every_module_the_reference_rank(rule: str) -> None:
    shapes = {"a": (64, 64), "b": (32, 96), "c": (128, 16)}
    assert ranks_of(dict.fromkeys(shapes, 0.0), shapes, rank=8, rule=rule) == dict.fromkeys(shapes, 8)


@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_one_dominating_module_takes_its_bound_and_no_more(rule: str) -> None:
    shapes = dict.fromkeys("abcdefgh", (64, 64))
    ranks = ranks_of(dict.fromkeys(shapes, 1e-9) | {"c": 1e9}, shapes, rank=8, rule=rule)
    assert ranks["c"] == 32
    assert all(ranks[name] >= 4 for name in shapes)


@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_tiny_modules_never_get_more_ranks_than_they_have_dimensions(rule: str) -> None:
    shapes = {"gate": (2, 64), "score": (64, 1), "normal": (64, 64)}
    ranks = ranks_of({"gate": 9.0, "score": 9.0, "normal": 1.0}, shapes, rank=8, rank_min=4, rule=rule)
    assert ranks["gate"] == 2
    assert ranks["score"] == 1
    assert 4 <= ranks["normal"] <= 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_importances_that_are_no_measure_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="GS-351") as caught:
        ranks_of({"a": 1.0, "b": value}, {"a": (8, 8), "b": (8, 8)})
    assert caught.value.fields["tensor"] == "b"


def test_a_sum_that_overflows_is_refused() -> None:
    with pytest.raises(InputError, match="GS-351"):
        ranks_of({"a": 1.7e308, "b": 1.7e308}, {"a": (8, 8), "b": (8, 8)})


def test_other_modules_than_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="GS-350"):
        ranks_of({"a": 1.0}, {"a": (8, 8), "b": (8, 8)})


@pytest.mark.parametrize("bad", [{"rank_min": 9}, {"rank_max": 7}, {"rank_min": -1}, {"rank": 0}])
def test_bounds_out_of_order_are_a_usage_error(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="GS-201"):
        ranks_of({"a": 1.0}, {"a": (64, 64)}, **({"rank": 8} | bad))


def test_llama_8b_attention_has_the_papers_parameter_count() -> None:
    """Table 7: 6.82M for LoRA at rank 8."""
    shapes = llama_8b_attention()
    assert lora_parameters(shapes, 8) == 6_815_744
    assert uniform_ranks(shapes, RankConfig(rank=8)).parameters == 6_815_744


def test_llama_8b_equal_share_of_the_budget_is_lora_itself() -> None:
    """Importance in proportion to sqrt(in + out) makes every raw rank the reference rank."""
    shapes = llama_8b_attention()
    for rule in ("paper", "exact"):
        plan = allocate_ranks({p: math.sqrt(sum(s)) for p, s in shapes.items()}, shapes, RankConfig(rule=rule))  # type: ignore[arg-type]
        assert set(plan.ranks.values()) == {8}
        assert plan.parameters == 6_815_744


def test_exact_rule_on_llama_8b_with_the_papers_tendency() -> None:
    """Figure 3a: values matter most, queries least. The count must come out at LoRA's."""
    shapes = llama_8b_attention()
    weight = {"q_proj": 1.0, "k_proj": 2.0, "v_proj": 9.0, "o_proj": 3.0}
    importances = {path: weight[path.rsplit(".", 1)[-1]] * (1 + i / 500) for i, path in enumerate(shapes)}
    plan = allocate_ranks(importances, shapes, RankConfig(rule="exact"))
    assert 6_815_744 - 5120 < plan.parameters <= 6_815_744
    by_name = {name: [r for p, r in plan.ranks.items() if p.endswith(name)] for name in weight}
    assert max(by_name["q_proj"]) < min(by_name["v_proj"])


def test_uniform_ranks_and_counts() -> None:
    plan = uniform_ranks({"a": (64, 32), "b": (2, 64)}, RankConfig(rank=8))
    assert plan.ranks == {"a": 8, "b": 2}
    assert plan.parameters == 8 * 96 + 2 * 66


sizes = st.integers(1, 300)
modules = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.tuples(st.tuples(sizes, sizes), st.one_of(st.just(0.0), st.floats(1e-6, 1e6))),
    min_size=1,
    max_size=12,
)


@st.composite
def bounded(draw: st.DrawFn) -> dict[str, int]:
    rank = draw(st.integers(1, 32))
    return {"rank": rank, "rank_min": draw(st.integers(0, rank)), "rank_max": draw(st.integers(rank, 128))}


def split(problem: Mapping[str, tuple[Shape, float]]) -> tuple[dict[str, float], dict[str, Shape]]:
    return {p: v[1] for p, v in problem.items()}, {p: v[0] for p, v in problem.items()}


def plan_of(problem: Mapping[str, tuple[Shape, float]], config: Mapping[str, int], rule: str) -> RankPlan:
    importances, shapes = split(problem)
    return allocate_ranks(importances, shapes, RankConfig(**config, rule=rule))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=80)
@given(problem=modules, config=bounded(), rule=st.sampled_from(["paper", "exact"]))
def test_ranks_stay_within_bounds(
    problem: Mapping[str, tuple[Shape, float]], config: Mapping[str, int], rule: str
) -> None:
    plan = plan_of(problem, config, rule)
    assert list(plan.ranks) == list(problem)
    for path, (shape, _) in problem.items():
        assert min(config["rank_min"], *shape) <= plan.ranks[path] <= min(config["rank_max"], *shape)


@settings(deadline=None, max_examples=60)
@given(problem=modules, config=bounded(), rule=st.sampled_from(["paper", "exact"]), power=st.integers(-30, 30))
def test_ranks_do_not_depend_on_the_importances_scale(
    problem: Mapping[str, tuple[Shape, float]], config: Mapping[str, int], rule: str, power: int
) -> None:
    scaled = {path: (shape, importance * 2.0**power) for path, (shape, importance) in problem.items()}
    assert plan_of(scaled, config, rule).ranks == plan_of(problem, config, rule).ranks


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=8),
    shape=st.tuples(st.integers(64, 200), st.integers(64, 200)),
    config=bounded(),
    rule=st.sampled_from(["paper", "exact"]),
)
def test_more_importance_never_means_fewer_ranks_at_one_shape(
    values: list[float], shape: Shape, config: Mapping[str, int], rule: str
) -> None:
    plan = plan_of({str(i): (shape, value) for i, value in enumerate(values)}, config, rule)
    given_ranks = [(value, plan.ranks[str(i)]) for i, value in enumerate(values)]
    assert all(r <= s for v, r in given_ranks for w, s in given_ranks if v < w)


@settings(deadline=None, max_examples=100)
@given(problem=modules, config=bounded())
def test_exact_spends_what_lora_spends_to_within_one_rank(
    problem: Mapping[str, tuple[Shape, float]], config: Mapping[str, int]
) -> None:
    plan = plan_of(problem, config, "exact")
    shapes = split(problem)[1]
    spent = sum(rank * (shapes[p][0] + shapes[p][1]) for p, rank in plan.ranks.items())
    allowed = sum(min(config["rank"], out, inn) * (out + inn) for out, inn in shapes.values())
    growing = [p for p in shapes if plan.ranks[p] < min(config["rank_max"], *shapes[p])]
    assert plan.parameters == spent
    assert plan.lora_parameters == allowed
    assert spent <= allowed
    assert not growing or allowed - spent < min(sum(shapes[p]) for p in growing)
