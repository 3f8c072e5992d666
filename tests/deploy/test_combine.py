"""Several adapters as one: sums exact in float64, TIES and DARE against numpy, and laws that hold for any adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.config import MergeMethod
from gora_serve.deploy.combine import Limits, Weighted, combine, shared_base
from gora_serve.deploy.methods import Term, dare, trim
from gora_serve.errors import BindingError, InputError
from gora_serve.integrity.manifest import Roots

SHAPES = {"model.layers.0.q": (7, 9), "model.layers.0.k": (5, 9), "model.layers.1.q": (7, 9)}
METHODS: tuple[MergeMethod, ...] = ("cat", "linear", "svd", "ties", "dare")


def random_adapter(seed: int, ranks: dict[str, int], scale: float = 1.0, **fields: Any) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for index, (path, rank) in enumerate(ranks.items()):
        out_features, in_features = SHAPES[path]
        A = torch.randn(rank, in_features, generator=generator)
        B = torch.randn(out_features, rank, generator=generator)
        modules[path] = LoraFactors(A, B, scale * (1 + index) / rank**0.5)
    return Adapter(modules, fields.pop("base", BaseId("tiny")), **fields)


def delta(adapter: Adapter, path: str) -> np.ndarray:
    """The update in float64, without the code under test."""
    factors = adapter.modules.get(path)
    if factors is None:
        return np.zeros(SHAPES[path])
    return factors.scale * (factors.B.double().numpy() @ factors.A.double().numpy())


def combine_adapters(
    adapters: Weighted,
    method: MergeMethod,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Adapter:
    return combine(adapters, method, Limits(rank, tolerance), density=density, seed=seed).adapter


def assert_deltas(adapter: Adapter, expected: dict[str, np.ndarray], tolerance: float = 1e-12) -> None:
    assert adapter.modules.keys() <= expected.keys()
    for path, update in expected.items():
        error = np.linalg.norm(delta(adapter, path) - update)
        assert error <= tolerance * (1 + np.linalg.norm(update)), path


ranks = st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 6), min_size=1)
adapters = st.builds(random_adapter, st.integers(0, 2**31), ranks, st.floats(0.05, 8))
weights = st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3)


@settings(deadline=None, max_examples=60)
@given(given=st.lists(st.tuples(adapters, weights), min_size=1, max_size=4))
def test_cat_is_the_sum_whatever_ranks_scales_and_modules(given: list[tuple[Adapter, float]]) -> None:
    expected = {path: sum(weight * delta(adapter, path) for adapter, weight in given) for path in SHAPES}
    assert_deltas(combine_adapters(given, "cat"), expected)


@settings(deadline=None, max_examples=40)
@given(one=adapters, other=adapters, first=weights, second=weights, factor=weights)
def test_cat_is_linear_in_its_weights(one: Adapter, other: Adapter, first: float, second: float, factor: float) -> None:
    merged = combine_adapters([(one, first), (other, second)], "cat")
    scaled = combine_adapters([(one, factor * first), (other, factor * second)], "cat")
    assert_deltas(scaled, {path: factor * delta(merged, path) for path in SHAPES}, 1e-11)
    nested = combine_adapters([(merged, factor), (other, second)], "cat")
    flat = combine_adapters([(one, factor * first), (other, factor * second + second)], "cat")
    assert_deltas(nested, {path: delta(flat, path) for path in SHAPES}, 1e-11)


@settings(deadline=None, max_examples=40)
@given(given=st.lists(st.tuples(adapters, st.floats(0.1, 3)), min_size=1, max_size=4))
def test_linear_is_the_mean(given: list[tuple[Adapter, float]]) -> None:
    total = sum(weight for _, weight in given)
    expected = {path: sum(weight / total * delta(adapter, path) for adapter, weight in given) for path in SHAPES}
    assert_deltas(combine_adapters(given, "linear"), expected)


@settings(deadline=None, max_examples=30)
@given(one=adapters, weight=weights, method=st.sampled_from(["cat", "dare", "svd"]))
def test_an_adapter_less_itself_is_nothing(one: Adapter, weight: float, method: MergeMethod) -> None:
    copy = replace(one, modules=dict(one.modules))
    assert not combine_adapters([(one, weight), (copy, -weight)], method, density=0.5).modules


@settings(deadline=None, max_examples=30)
@given(one=adapters, method=st.sampled_from(["cat", "linear", "ties", "dare"]))
def test_one_adapter_is_itself_and_full_rank_changes_nothing(one: Adapter, method: MergeMethod) -> None:
    merged = combine_adapters([(one, 1.0)], method, density=1.0, rank=9)
    assert_deltas(merged, {path: delta(one, path) for path in SHAPES}, 1e-12)
    assert all(merged.ranks[path] == min(one.ranks[path], *SHAPES[path]) for path in one.modules)


@settings(deadline=None, max_examples=20)
@given(given=st.lists(st.tuples(adapters, weights), min_size=1, max_size=3), seed=st.integers(0, 2**40))
def test_dare_that_drops_nothing_is_cat(given: list[tuple[Adapter, float]], seed: int) -> None:
    kept = combine_adapters(given, "dare", density=1.0, seed=seed, tolerance=0.0)
    assert_deltas(kept, {path: delta(combine_adapters(given, "cat"), path) for path in SHAPES})


@settings(deadline=None, max_examples=25)
@given(
    given=st.lists(st.tuples(adapters, st.floats(0.1, 3)), min_size=2, max_size=4),
    method=st.sampled_from(METHODS),
    data=st.data(),
)
def test_the_order_makes_no_difference_not_even_a_bit(
    given: list[tuple[Adapter, float]], method: MergeMethod, data: st.DataObject
) -> None:
    merged = combine_adapters(given, method, density=0.6)
    shuffled = combine_adapters(data.draw(st.permutations(given)), method, density=0.6)
    assert merged.ranks == shuffled.ranks
    for path in merged.modules:
        # A mean's weights are divided by one float sum, which fsum rounds once whatever the order.
        assert torch.equal(merged.modules[path].A, shuffled.modules[path].A)
        assert torch.equal(merged.modules[path].B, shuffled.modules[path].B)


def numpy_ties(updates: list[np.ndarray], density: float) -> np.ndarray:
    """Algorithm 1 of Yadav et al. (2023), written from the paper."""
    kept = []
    for update in updates:
        order = np.argsort(-np.abs(update), axis=None, kind="stable")[: round(density * update.size)]
        trimmed = np.zeros(update.size)
        trimmed[order] = update.flatten()[order]
        kept.append(trimmed.reshape(update.shape))
    elected = np.sign(sum(kept))
    merged = np.zeros_like(updates[0])
    for row in range(merged.shape[0]):
        for column in range(merged.shape[1]):
            agreeing = [one[row, column] for one in kept if elected[row, column] and
                        np.sign(one[row, column]) == elected[row, column]]  # fmt: skip
            merged[row, column] = np.mean(agreeing) if agreeing else 0.0
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers_on_updates(density: float) -> None:
    given = [
        (random_adapter(1, dict.fromkeys(SHAPES, 3), 4.0), 1.0),
        (random_adapter(2, {"model.layers.0.q": 5}), 0.5),
        (random_adapter(3, dict.fromkeys(SHAPES, 2)), -1.5),
    ]
    merged = combine_adapters(given, "ties", density=density, tolerance=0.0)
    expected = {}
    for path in SHAPES:
        terms = [weight * delta(adapter, path) for adapter, weight in given if path in adapter.modules]
        expected[path] = numpy_ties(terms, density)
    assert_deltas(merged, expected, 1e-12)


def test_dare_keeps_the_share_and_rescales_it() -> None:
    big = LoraFactors(torch.ones(1, 400), torch.ones(300, 1), 2.0)
    kept = dare([Term(big, 1.5)], 0.25, 7, "a").delta()
    assert set(kept.unique().tolist()) == {0.0, 2.0 * 1.5 / 0.25}
    assert abs(float((kept != 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert torch.equal(kept, dare([Term(big, 1.5)], 0.25, 7, "a").delta())
    assert not torch.equal(kept, dare([Term(big, 1.5)], 0.25, 8, "a").delta())
    assert not torch.equal(kept, dare([Term(big, 1.5)], 0.25, 7, "b").delta())


def test_trimming_keeps_equal_values_together() -> None:
    delta = torch.tensor([[3.0, -2.0, 2.0], [1.0, 0.5, 0.0]], dtype=torch.float64)
    assert trim(delta, 2 / 6).tolist() == [[3.0, -2.0, 2.0], [0.0, 0.0, 0.0]]
    assert torch.equal(trim(delta, 1.0), delta)
    assert trim(delta, 1e-9).tolist() == [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_limits_hold_over_all_modules_together() -> None:
    given = [(random_adapter(seed, dict.fromkeys(SHAPES, 4)), 1.0) for seed in (1, 2)]
    costs = {path: sum(shape) for path, shape in SHAPES.items()}
    exact = combine(given, "cat", Limits())
    assert exact.ranks == {path: min(8, *SHAPES[path]) for path in SHAPES}
    for limits, most in [(Limits(rank=2), 2 * sum(costs.values())), (Limits(parameters=77), 77)]:
        done = combine(given, "cat", limits)
        assert 0 < sum(costs[path] * rank for path, rank in done.ranks.items()) <= most
        lost = sum(done.spectra[path].load().dropped(done.ranks[path]) ** 2 for path in SHAPES) ** 0.5
        error = sum(np.linalg.norm(delta(done.adapter, p) - delta(exact.adapter, p)) ** 2 for p in SHAPES) ** 0.5
        assert error == pytest.approx(lost, rel=1e-9)
    done = combine(given, "cat", Limits(tolerance=0.3))
    whole = sum(np.linalg.norm(delta(exact.adapter, path)) ** 2 for path in SHAPES) ** 0.5
    assert (
        sum(np.linalg.norm(delta(done.adapter, p) - delta(exact.adapter, p)) ** 2 for p in SHAPES) ** 0.5 <= 0.3 * whole
    )


@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
def test_without_a_limit_these_are_no_larger_than_the_largest(method: MergeMethod) -> None:
    given = [(random_adapter(1, dict.fromkeys(SHAPES, 3)), 1.0), (random_adapter(2, {"model.layers.0.q": 2}), 1.0)]
    done = combine(given, method, Limits(), density=0.5)
    assert done.limits == Limits(parameters=given[0][0].parameters)
    assert 0 < done.adapter.parameters <= given[0][0].parameters


ROOTS = Roots("gw1:sha256:" + "1" * 64)
OTHER = Roots("gw1:sha256:" + "2" * 64)


def test_adapters_of_different_bases_are_refused() -> None:
    one, other = BaseId("org/base", "abc", ROOTS), BaseId("folder", None, ROOTS, asserted=True)
    made = [random_adapter(seed, {"model.layers.0.q": 2}, base=base) for seed, base in enumerate((other, one))]
    assert shared_base(made) == BaseId("org/base", "abc", ROOTS, asserted=True)
    assert combine_adapters([(adapter, 1.0) for adapter in made], "cat").base == shared_base(made)
    for base in (BaseId("org/base", "abc", OTHER), BaseId("elsewhere")):
        with pytest.raises(BindingError, match="GS-4450"):
            combine_adapters([(made[0], 1.0), (replace(made[1], base=base), 1.0)], "cat")
    unbound = replace(made[0], base=BaseId("folder"))
    assert shared_base([unbound, made[0]]) == BaseId("folder")
    with pytest.raises(BindingError, match="GS-4450"):
        shared_base([unbound, replace(made[0], base=BaseId("another"))])


def test_a_module_in_two_shapes_and_nan_are_refused_with_its_name() -> None:
    one = random_adapter(1, {"model.layers.0.q": 2, "model.layers.0.k": 2})
    shape = LoraFactors(torch.ones(2, 9), torch.ones(5, 2), 1.0)
    with pytest.raises(BindingError, match=r"(?s)GS-4451.*model\.layers\.0\.q"):
        combine_adapters([(one, 1.0), (replace(one, modules={"model.layers.0.q": shape}), 1.0)], "cat")
    broken = LoraFactors(torch.full((2, 9), float("nan")), torch.ones(7, 2), 1.0)
    with pytest.raises(InputError, match=r"(?s)GS-3105.*model\.layers\.1\.q"):
        combine_adapters([(one, 1.0), (replace(one, modules={"model.layers.1.q": broken}), 1.0)], "cat")


@pytest.mark.parametrize(
    ("weights", "method"), [([], "cat"), ([0.0, 0.0], "cat"), ([1.0, float("nan")], "cat"), ([1.0, -1.0], "linear")]
)
def test_weights_that_say_nothing_are_refused(weights: list[float], method: MergeMethod) -> None:
    with pytest.raises(InputError, match="GS-3450"):
        combine_adapters([(random_adapter(1, {"model.layers.0.q": 2}), weight) for weight in weights], method)


def test_tasks_must_agree() -> None:
    one = random_adapter(1, {"model.layers.0.q": 2})
    assert combine_adapters([(one, 1.0), (replace(one, task_type=None), 1.0)], "cat").task_type == "CAUSAL_LM"
    with pytest.raises(InputError, match="GS-3453"):
        combine_adapters([(one, 1.0), (replace(one, task_type="SEQ_CLS"), 1.0)], "cat")


def test_what_is_carried_is_kept_averaged_or_refused() -> None:
    one, other = (random_adapter(seed, {"model.layers.0.q": 2}) for seed in (1, 2))
    head, bias = torch.randn(3, 9), torch.randn(3)
    both = [replace(one, carried={"score.weight": head}), replace(other, carried={"score.weight": head.clone()})]
    merged = combine_adapters([(both[0], 1.0), (both[1], 1.0)], "ties")
    assert torch.equal(merged.carried["score.weight"], head)
    alone = combine_adapters([(both[0], 1.0), (other, 0.5)], "cat")
    assert torch.equal(alone.carried["score.weight"], head)
    different = replace(other, carried={"score.weight": head + 1, "score.bias": bias})
    mean = combine_adapters([(both[0], 1.0), (replace(different, carried={"score.weight": head + 1}), 3.0)], "linear")
    expected = (0.25 * head.double() + 0.75 * (head + 1).double()).float()
    assert torch.equal(mean.carried["score.weight"], expected)
    conflicts: list[tuple[list[tuple[Adapter, float]], MergeMethod]] = [
        ([(both[0], 1.0), (different, 1.0)], "cat"),  # W0 would be needed
        ([(both[0], 0.5), (other, 0.5)], "cat"),  # so it would
        ([(both[0], 1.0), (different, 1.0)], "linear"),  # score.bias is in one alone
        ([(both[0], 0.5), (replace(other, carried={"score.weight": head + 1}), 0.5)], "ties"),
        ([(replace(one, carried={"model.layers.0.q.weight": head}), 1.0), (other, 1.0)], "cat"),
        ([(both[0], 0.5), (replace(other, carried={"score.weight": head[:2]}), 0.5)], "cat"),
    ]
    for given_adapters, method in conflicts:
        with pytest.raises(InputError, match="GS-3451") as caught:
            combine_adapters(given_adapters, method)
        summed = "weights that sum" in str(caught.value.fields["actual"])  # the mean alone would do
        assert ("--method linear" in str(caught.value.fields["try"])) == summed


def test_embeddings_stay_embeddings() -> None:
    one = random_adapter(1, {"model.layers.0.q": 2}, embeddings=frozenset({"model.layers.0.q"}))
    merged = combine_adapters([(one, 1.0), (random_adapter(2, {"model.layers.0.k": 2}), 1.0)], "cat")
    assert merged.embeddings == {"model.layers.0.q"}


def test_threads_and_hash_seed_move_nothing_but_roundings() -> None:
    given = [(random_adapter(seed, dict.fromkeys(SHAPES, 4)), 1.0) for seed in (1, 2)]
    before = torch.get_num_threads()
    merged = combine_adapters(given, "dare", density=0.5)
    try:
        torch.set_num_threads(2)
        again = combine_adapters(given, "dare", density=0.5)
    finally:
        torch.set_num_threads(before)
    assert_deltas(again, {path: delta(merged, path) for path in SHAPES}, 1e-12)
