"""The numbers of the gap against dense float64, on a base that PEFT's PiSSA really edited; and the cost of N tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_base import Edited, train_pissa
from tiny_models import LLAMA_PATHS, MakeAdapter, build_llama, llama_shapes
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.linalg import NUMERICAL
from gora_serve.deploy import gap as gap_file
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.cost import deployments
from gora_serve.deploy.gap import NORMS, ModuleGap, Parts, measure_gap
from gora_serve.deploy.trained_on import quantization
from gora_serve.errors import BindingError, InputError
from gora_serve.progress import Progress

HEAD = "lm_head"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=list(DTYPES))
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Edited]:
    """A base in this dtype, and PiSSA on it that moved a little."""
    folder = tmp_path_factory.mktemp(request.param)
    build_llama().to(DTYPES[request.param]).save_pretrained(folder / "base")
    return folder / "base", train_pissa(folder, folder / "base", lr=1e-3)


def dense(edited: Edited, path: str) -> dict[str, Tensor]:
    return {"stored": edited.stored[path].delta(), "taken": edited.taken[path].delta()}


def leading(W: Tensor, residual: Tensor) -> LoraFactors:
    """The best rank-4 part of W0 - W_res: P0 as the edited base tells it."""
    U, S, V = torch.linalg.svd(W.double() - residual.double(), full_matrices=False)
    return LoraFactors(V[:4].contiguous(), (U[:, :4] * S[:4]).contiguous(), 1.0)


def test_the_numbers_are_those_of_dense_matrices(case: tuple[Path, Edited]) -> None:
    base, edited = case
    weights = BaseWeights(base)
    told: list[Progress] = []
    parts = edited.parts(base, mutated=BaseWeights(edited.mutated))
    gap = measure_gap(parts, torch.bfloat16, listen=told.append)
    assert set(gap.modules) == set(LLAMA_PATHS)
    assert (told[-1].done, told[-1].total, len(told)) == (14, 14, 14)
    assert (gap.loads, gap.estimated) == (True, False)
    for path, module in gap.modules.items():
        W = weights.weight(path).double()
        d = dense(edited, path)
        update = d["stored"] - d["taken"]
        remainder = edited.residual[path].double() - (W - d["taken"])
        assert module.weight == pytest.approx(float(W.norm()), rel=1e-12)
        assert module.update == pytest.approx(float(update.norm()), rel=1e-9)
        assert module.initial == pytest.approx(float(d["taken"].norm()), rel=1e-9)
        assert module.unconverted == pytest.approx(float((d["stored"] - update).norm()), rel=1e-9)
        assert module.base_rounding == pytest.approx(float(remainder.norm()), rel=1e-9)
        exact = parts.exact[path]
        concatenated = exact.B.bfloat16().double() @ exact.A.bfloat16().double()
        assert module.stored_plain == pytest.approx(float((concatenated - update).norm()), rel=1e-9)
        assert module.plain_rank == 8
        assert module.served_rank == 4
        assert module.quantized is None


def test_what_is_stored_is_what_convert_writes(case: tuple[Path, Edited], tmp_path: Path) -> None:
    """The ranks and errors are those of the receipt, which come from the written file."""
    from converters.convert import convert
    from converters.reading import Inputs
    from gora_serve.config import ConvertConfig
    from gora_serve.integrity.bases import Base

    base, edited = case
    inputs = Inputs(init_adapter=edited.initial)
    config = ConvertConfig("pissa", dtype="bfloat16")
    done = convert(edited.adapter, Base(str(base), base), tmp_path / "out", config, inputs)
    parts = replace(edited.parts(base), exact=done.reading.adapter.modules)
    gap = measure_gap(parts, torch.bfloat16, tolerance=NUMERICAL["bfloat16"])
    for path, module in gap.modules.items():
        assert module.rank == done.modules[path].rank
        assert module.stored == pytest.approx(done.modules[path].error, rel=1e-6)
        assert module.update == pytest.approx(done.modules[path].norm, rel=1e-6)


def test_without_the_edited_base_its_rounding_follows_from_the_dtype(case: tuple[Path, Edited]) -> None:
    base, edited = case
    best = {path: leading(BaseWeights(base).weight(path), residual) for path, residual in edited.residual.items()}
    measured = measure_gap(edited.parts(base, initial=best, mutated=BaseWeights(edited.mutated)), torch.bfloat16)
    estimated = measure_gap(edited.parts(base), torch.bfloat16)
    assert estimated.estimated
    stored = BaseWeights(base).weight(LLAMA_PATHS[0]).dtype
    one, other = (gap.norms()["base_rounding"] for gap in (measured, estimated))
    assert one is not None
    assert other is not None
    if stored == torch.bfloat16:
        # The best part of rank 4 of a 32 x 32 matrix holds 4 (32 + 32 - 4) / 32² = 23 % of the rounding's square too.
        assert 0.8 * other < one < other
        exact = measure_gap(edited.parts(base, dtype=torch.float32), torch.bfloat16).norms()["base_rounding"]
        assert exact is not None
        assert exact < 1e-4 * other  # a base that was loaded in float32 was not rounded so
    else:
        assert other < 1e-6 * float(measured.norms()["weight"] or 0)
        coarse = measure_gap(edited.parts(base, dtype=torch.bfloat16), torch.bfloat16).norms()["base_rounding"]
        assert coarse is not None
        assert coarse > 1e3 * other


def test_concatenation_is_bad_where_training_moved_little(case: tuple[Path, Edited]) -> None:
    base, edited = case
    shares = measure_gap(edited.parts(base), torch.bfloat16, tolerance=5e-4).shares()
    assert shares["stored_of_update"] == pytest.approx(0.003, abs=0.002)
    assert (shares["stored_plain_of_update"] or 0) > 10 * (shares["stored_of_update"] or 0)
    assert (shares["unconverted_of_update"] or 0) > 5


def test_plain_lora_has_no_gap(tiny_base: Path, make_adapter: MakeAdapter) -> None:
    modules = make_adapter(dict.fromkeys(LLAMA_PATHS, 3), shapes=llama_shapes()).modules
    copies = {path: replace(factors, A=factors.A.clone()) for path, factors in modules.items()}
    gap = measure_gap(Parts(BaseWeights(tiny_base), modules, copies), torch.bfloat16)
    assert {module.unconverted for module in gap.modules.values()} == {0.0}
    assert gap.within(0.0)
    assert gap.norms()["initial"] is gap.norms()["base_rounding"] is None
    # of thin factors: compressing them is as good as leaving them
    shares = gap.shares()
    assert shares["stored_of_update"] == pytest.approx(shares["stored_plain_of_update"], rel=0.5)


def test_a_wrong_scale_is_a_gap(tiny_base: Path, make_adapter: MakeAdapter) -> None:
    modules = make_adapter(dict.fromkeys(LLAMA_PATHS, 3), shapes=llama_shapes()).modules
    served = {path: replace(factors, scale=factors.scale * 2**0.5) for path, factors in modules.items()}
    gap = measure_gap(Parts(BaseWeights(tiny_base), modules, served), torch.float32)
    assert gap.shares()["unconverted_of_update"] == pytest.approx(2**0.5 - 1)
    assert gap.within(0.42)
    assert not gap.within(0.41)


def test_an_adapter_that_no_engine_loads_is_not_a_number(tiny_base: Path, tiny_adapter: Any) -> None:
    gap = measure_gap(Parts(BaseWeights(tiny_base), tiny_adapter.modules), torch.bfloat16)
    assert gap.norms()["unconverted"] is None
    assert not gap.within(1e9)


def test_an_untrained_adapter_is_off_by_all_that_was_taken(case: tuple[Path, Edited]) -> None:
    """dW is zero: no share of it can be told, and the answer is no."""
    base, edited = case
    gap = measure_gap(edited.parts(base, exact={}, served=edited.taken), torch.bfloat16)
    assert gap.norms()["unconverted"] == gap.norms()["initial"]
    assert gap.shares()["unconverted_of_update"] is None
    assert gap.shares()["unconverted_of_weight"] == gap.shares()["initial_of_weight"]
    assert not gap.within(1e9)


def test_modules_that_only_one_side_has(tiny_base: Path, tiny_adapter: Any) -> None:
    first, second = LLAMA_PATHS[:2]
    exact, served = ({path: tiny_adapter.modules[path]} for path in (first, second))
    gap = measure_gap(Parts(BaseWeights(tiny_base), exact, served), torch.float32)
    assert gap.modules[first].unconverted == gap.modules[first].update
    assert gap.modules[second].update == 0
    assert gap.modules[second].unconverted == pytest.approx(float(served[second].delta().norm()))


def test_an_update_of_full_rank(tiny_base: Path) -> None:
    path, generator = LLAMA_PATHS[0], torch.Generator().manual_seed(0)
    delta = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    exact = {path: LoraFactors(delta, torch.eye(32, dtype=torch.float64), 1.0)}
    gap = measure_gap(Parts(BaseWeights(tiny_base), exact, full_rank=True), torch.bfloat16)
    module = gap.modules[path]
    assert module.update == pytest.approx(float(delta.norm()), rel=1e-12)
    assert (module.stored, module.stored_plain, module.rank, module.plain_rank) == (None, None, 0, 0)


def test_a_quantized_base_and_its_head(tiny_base: Path, make_adapter: MakeAdapter) -> None:
    """The head is never in 4 bits: it counts neither in the error nor in what the error is a share of."""
    path = LLAMA_PATHS[0]
    modules = make_adapter({path: 2, HEAD: 2}, shapes={**llama_shapes(), HEAD: (384, 32)}).modules
    base = BaseWeights(tiny_base)

    def halves(weight: Tensor) -> Tensor:
        return (weight * 2).round() / 2

    gap = measure_gap(Parts(base, modules, modules, requantize=halves), torch.bfloat16)
    W = base.weight(path).double()
    error = float((halves(W) - W).norm())
    assert gap.modules[HEAD].quantized is None
    assert gap.modules[path].quantized == pytest.approx(error)
    assert gap.norms()["quantized"] == pytest.approx(error)
    assert gap.shares()["quantized_of_weight"] == pytest.approx(error / float(W.norm()))


def test_a_residual_that_was_quantized(case: tuple[Path, Edited]) -> None:
    """QPiSSA: W_res is W0 - P0 in 4 bits."""
    base, edited = case

    def halves(weight: Tensor) -> Tensor:
        return (weight.float() * 2).round() / 2

    gap = measure_gap(edited.parts(base, requantize=halves), torch.bfloat16)
    path = LLAMA_PATHS[3]
    weight = BaseWeights(base).weight(path)
    rest = weight.double() - edited.taken[path].delta()
    expected = halves(rest.to(weight.dtype)).double() - rest
    assert gap.modules[path].base_rounding == pytest.approx(float(expected.norm()), rel=1e-9)


def test_blocks_of_rows_change_nothing(case: tuple[Path, Edited], monkeypatch: pytest.MonkeyPatch) -> None:
    base, edited = case
    parts = edited.parts(base, mutated=BaseWeights(edited.mutated))
    whole = measure_gap(parts, torch.bfloat16)
    monkeypatch.setattr(gap_file, "BLOCK", 96)  # three rows, of a number that three does not divide
    parted = measure_gap(parts, torch.bfloat16)
    for path in LLAMA_PATHS:
        for name in NORMS[:-1]:
            assert getattr(parted.modules[path], name) == pytest.approx(getattr(whole.modules[path], name), rel=1e-12)


def test_totals_are_roots_of_sums_of_squares(case: tuple[Path, Edited]) -> None:
    base, edited = case
    gap = measure_gap(edited.parts(base), torch.bfloat16)
    for name in ("weight", "update", "unconverted", "base_rounding"):
        squares = [getattr(module, name) ** 2 for module in gap.modules.values()]
        assert gap.norms()[name] == pytest.approx(math.sqrt(sum(squares)), rel=1e-12)
    some = LLAMA_PATHS[:3]
    part, whole = (math.hypot(*(getattr(gap.modules[path], name) for path in some)) for name in ("stored", "update"))
    assert gap.shares(some)["stored_of_update"] == pytest.approx(part / whole)


def test_what_does_not_belong_together(tiny_base: Path, make_adapter: MakeAdapter, case: tuple[Path, Edited]) -> None:
    base = BaseWeights(tiny_base)
    path = LLAMA_PATHS[0]
    with pytest.raises(BindingError, match="GS-405"):
        measure_gap(Parts(base, make_adapter({path: 2}).modules), torch.bfloat16)
    with pytest.raises(BindingError, match="GS-404"):
        measure_gap(Parts(base, make_adapter({"model.layers.9.mlp.up_proj": 2}).modules), torch.bfloat16)
    huge = LoraFactors(torch.full((1, 32), 1e6), torch.ones(32, 1), 1.0)
    with pytest.raises(InputError, match="GS-3194"):
        measure_gap(Parts(base, {path: huge}), torch.float16)


def test_an_edited_base_of_another_shape(tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    build_llama(hidden_size=64).save_pretrained(tmp_path)
    modules = make_adapter({LLAMA_PATHS[0]: 2}, shapes=llama_shapes()).modules
    parts = Parts(BaseWeights(tiny_base), modules, modules, modules, BaseWeights(tmp_path))
    with pytest.raises(InputError, match="GS-3190"):
        measure_gap(parts, torch.bfloat16)


# The cost of N tasks


def module(shape: tuple[int, int], rank: int, plain: int, served: int) -> ModuleGap:
    return ModuleGap(shape, 1, 1, 1, 1, 1, 1, 1, None, rank, plain, served)


def of_name(modules: Mapping[str, ModuleGap], **settings: Any) -> dict[str, Any]:
    trained = sum(one.parameters * (one.served_rank or 0) for one in modules.values())
    found = deployments(modules, **({"trained": trained, "base_bytes": 10_000, "itemsize": 2, "tasks": 5} | settings))
    return {one.name: one for one in found}


def test_cost_of_a_pissa_like_adapter() -> None:
    modules = {"a": module((100, 50), 30, 32, 16), "b": module((10, 30), 20, 32, 16)}
    costs = of_name(modules)
    width = 150 + 40
    assert list(costs) == [
        "a base per task",
        "one base, not compressed",
        "one base, converted",
        "one base, GoRA at rank 16",
    ]
    assert costs["a base per task"].stored == costs["a base per task"].in_memory == 50_000
    plain, converted, gora = list(costs.values())[1:]
    assert (plain.stored, plain.max_rank, plain.bucket) == (10_000 + 5 * 2 * 32 * width, 32, 32)
    assert converted.stored == 10_000 + 5 * 2 * (30 * 150 + 20 * 40)
    assert (converted.max_rank, converted.bucket) == (30, 32)
    assert converted.in_memory == plain.in_memory == 10_000 + 5 * 2 * 32 * width  # slots are padded
    assert (gora.stored, gora.max_rank, gora.is_bound) == (10_000 + 5 * 2 * 16 * width, 64, True)


def test_cost_of_ranks_that_no_engine_holds() -> None:
    costs = of_name({"a": module((2000, 2000), 256, 520, 260)})
    assert costs["one base, not compressed"].bucket is None
    assert costs["one base, not compressed"].in_memory is None
    assert costs["one base, converted"].bucket == 256


def test_cost_of_an_update_of_full_rank() -> None:
    """It is no adapter: a base per task, or GoRA at its default rank."""
    costs = of_name({"a": module((100, 50), 0, 0, 0)})
    assert list(costs) == ["a base per task", "one base, GoRA at rank 8"]
    assert costs["one base, GoRA at rank 8"].stored == 10_000 + 5 * 2 * 8 * 150


# What an adapter says of the base that it was trained on


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", True), ("a/b-BNB-4bit/", True), ("x-nf4", True), ("a/b-4bit-mlx", False),
        ("meta-llama/Llama-3-8B", False), ("", False), ("/hub/models--a--b-bnb-4bit/snapshots/0123abcd", True),
    ],
)  # fmt: skip
def test_names_of_bases_in_4_bits(name: str, found: bool) -> None:
    assert bool(quantization({}, name, Path("f"))) == found


def test_our_own_record_of_a_base_in_4_bits() -> None:
    def metadata(origin: Mapping[str, str]) -> dict[str, str]:
        record = {"schema": "gora-serve/adapter/1", "base": {}, "origin": origin}
        return {"gora_serve": json.dumps(record)}

    said = quantization(metadata({"trained_on": json.dumps({"quantize": "nf4"})}), "base", Path("f"))
    assert said == ("nf4", "the adapter's own record says so")
    assert quantization(metadata({}), "base", Path("f")) is None
    with pytest.raises(InputError, match="GS-363"):
        quantization(metadata({"trained_on": "[]"}), "base", Path("f"))


def test_cost_of_gora_follows_what_was_trained_and_not_the_converted_rank() -> None:
    """LoHa of rank 4 trains as many parameters as LoRA of rank 8, and is exact at rank 16."""
    modules = {"a": module((100, 50), 16, 16, 0)}
    assert "one base, GoRA at rank 8" in of_name(modules, trained=8 * 150 + 40)
