"""From adapters to one adapter folder: bound, sealed, measured, with a receipt; PEFT loads what was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_models import LLAMA_PATHS, MakeAdapter, build_llama, llama_shapes
from transformers import AutoModelForCausalLM

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.format import read_adapter
from gora_serve.config import ExportConfig, MergeConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.combine_files import Ingredient, MergedAdapter, merge_into_adapter
from gora_serve.errors import BindingError, InputError, UsageError
from gora_serve.integrity.canonical import canonical_json
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.verify import verify_adapter
from gora_serve.training.export import export_adapter


@pytest.fixture
def bound(tiny_base: Path) -> BaseId:
    return BaseId(str(tiny_base), None, hash_model(tiny_base).roots)


@pytest.fixture
def ingredients(tmp_path: Path, bound: BaseId, make_adapter: MakeAdapter) -> list[Ingredient]:
    """Two exports with other ranks, scales and modules, in two forms."""
    made = []
    for seed, form, paths in ((1, "native", LLAMA_PATHS[:-2]), (2, "unit", LLAMA_PATHS[1:])):
        ranks = {path: (1, 3, 8)[(index + seed) % 3] for index, path in enumerate(paths)}
        adapter = make_adapter(ranks, shapes=llama_shapes(), seed=seed, base=bound)
        folder = tmp_path / f"in-{seed}"
        done = export_adapter(adapter, folder, ExportConfig(form))  # type: ignore[arg-type]
        files = (folder / "adapter_model.safetensors", folder / "adapter_config.json")
        made.append(Ingredient(str(folder), read_adapter(folder), 0.5 * seed, files, done.root))
    return made


def merge(given: Sequence[Ingredient], base: Path, bound: BaseId, output: Path, **config: Any) -> MergedAdapter:
    return merge_into_adapter(given, BaseWeights(base), bound, output, MergeConfig(into="adapter", **config))


def assert_sum(written: Adapter, given: Sequence[Ingredient]) -> None:
    for path, shape in llama_shapes().items():
        expected = np.zeros(shape)
        for one in given:
            factors = one.adapter.modules.get(path)
            if factors:
                expected += one.weight * factors.scale * (factors.B.double() @ factors.A.double()).numpy()
        found = written.modules.get(path)
        actual = found.delta().numpy() if found else np.zeros(shape)
        assert np.linalg.norm(actual - expected) <= 2e-7 * (1 + np.linalg.norm(expected)), path


def test_the_folder_is_bound_sealed_and_the_sum(
    tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    done = merge(ingredients, tiny_base, bound, tmp_path / "out")
    verified = verify_adapter(tmp_path / "out", base=tiny_base)
    assert (verified.root, verified.bound_to, verified.warnings) == (done.root, bound.roots, ())
    assert_sum(read_adapter(tmp_path / "out"), ingredients)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "gora_manifest.json", "merge.json",
    ]  # fmt: skip
    receipt = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert receipt == json.loads(json.dumps(done.receipt))
    assert receipt["error"] < 1e-7
    assert [one["adapter_root"] for one in receipt["adapters"]] == [one.root for one in ingredients]
    assert [one["weight"] for one in receipt["adapters"]] == [0.5, 1.0]
    assert all(len(one["files"]) == 2 for one in receipt["adapters"])
    assert receipt["modules"].keys() == llama_shapes().keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LoRA adapter, merged" in card
    assert f"`{ingredients[0].root}` * 0.5" in card


def test_peft_computes_the_sum(tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]) -> None:
    merge(ingredients, tiny_base, bound, tmp_path / "out")
    tokens = torch.arange(1, 13).reshape(1, -1)
    model = build_llama().double()
    for path in llama_shapes():
        weight = model.get_submodule(path).weight
        for one in ingredients:
            if path in one.adapter.modules:
                weight.data += one.weight * one.adapter.modules[path].delta()
    expected = model(tokens).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    actual = PeftModel.from_pretrained(base, str(tmp_path / "out")).double()(tokens).logits
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_order_changes_no_byte_of_the_weights(
    tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    merge(ingredients, tiny_base, bound, tmp_path / "out", method="dare", density=0.7)
    merge(ingredients[::-1], tiny_base, bound, tmp_path / "again", method="dare", density=0.7)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_truncation_is_stated_as_it_is(
    tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    exact = merge(ingredients, tiny_base, bound, tmp_path / "exact")
    done = merge(ingredients, tiny_base, bound, tmp_path / "out", rank=2, dtype="bfloat16")
    written, full = read_adapter(tmp_path / "out").modules, read_adapter(tmp_path / "exact").modules
    assert 0 < exact.error < 1e-7
    assert done.error > done.truncated > 0.1
    for path, module in done.modules.items():
        zero = torch.zeros(llama_shapes()[path], dtype=torch.float64)
        difference = full[path].delta() - (written[path].delta() if path in written else zero)
        assert module.error == pytest.approx(float(difference.norm()), rel=1e-5)
    with pytest.raises(UsageError, match="GS-201"):
        MergeConfig(into="adapter", rank=2, parameters=100).validate()


def test_refusals_leave_nothing(tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]) -> None:
    one = ingredients[0]
    with pytest.raises(InputError, match="GS-3452"):
        merge([one, replace(one, weight=-one.weight)], tiny_base, bound, tmp_path / "out")
    stranger = {"model.layers.9.mlp.up_proj": LoraFactors(torch.ones(1, 32), torch.ones(48, 1), 1.0)}
    with pytest.raises(BindingError, match=r"(?s)GS-404.*layers\.9"):
        merge([replace(one, adapter=replace(one.adapter, modules=stranger))], tiny_base, bound, tmp_path / "out")
    carried = replace(one.adapter, carried={"lm_head.weight": torch.ones(3, 32)})
    with pytest.raises(BindingError, match=r"(?s)GS-405.*lm_head"):
        merge([replace(one, adapter=carried)], tiny_base, bound, tmp_path / "out")
    path = LLAMA_PATHS[0]
    tiny = {path: LoraFactors(torch.full_like(one.adapter.modules[path].A, 1e-9), one.adapter.modules[path].B, 1e-9)}
    with pytest.raises(InputError, match="GS-3454"):
        merge([replace(one, adapter=replace(one.adapter, modules=tiny))], tiny_base, bound, tmp_path / "out",
              dtype="float16")  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_why_nothing_is_left(tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]) -> None:
    one = ingredients[0]
    modules = {path: replace(factors, B=0 * factors.B) for path, factors in one.adapter.modules.items()}
    zero = replace(one, adapter=replace(one.adapter, modules=modules))
    for given, settings, why in (
        ([one, replace(one, weight=-one.weight)], {}, "they cancel"),
        ([zero], {}, "each of them is zero"),
        ([zero, zero], {"method": "dare"}, "each of them is zero"),
        ([one], {"method": "dare", "density": 1e-9}, "--method dare keeps 1e-09 of their values"),
    ):
        with pytest.raises(InputError, match="GS-3452") as caught:
            merge(given, tiny_base, bound, tmp_path / "out", **settings)
        assert str(caught.value.fields["actual"]).startswith(why)


def test_a_number_of_parameters_that_keeps_nothing_is_no_cancelling(
    tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    with pytest.raises(InputError, match="GS-3456") as caught:
        merge(ingredients, tiny_base, bound, tmp_path / "out", parameters=10)
    smallest = min(sum(llama_shapes()[path]) for one in ingredients for path in one.adapter.modules)
    assert caught.value.fields["expected"] == f"--parameters {smallest} or more"
    with pytest.raises(InputError, match="GS-3456"):
        merge(ingredients, tiny_base, bound, tmp_path / "out", parameters=smallest - 1)
    assert merge(ingredients, tiny_base, bound, tmp_path / "out", parameters=smallest).adapter.parameters == smallest


def test_padding_is_told_as_padding(
    tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    for name, settings, whose in (("a", {"method": "svd"}, "largest adapter"), ("b", {"parameters": 900}, "asked for")):
        done = merge(ingredients, tiny_base, bound, tmp_path / name, form="padded", **settings)
        [warning] = done.warnings
        assert "padded" in warning
        assert whose in warning
        assert "experts" not in warning
        assert ("asked for" in warning) == ("parameters" in settings)


def test_what_all_adapters_say_of_their_base_in_4_bits_stays_said(
    tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    said = {"trained_on": canonical_json({"quantize": "nf4"}).decode()}
    quantized = [replace(one, adapter=replace(one.adapter, origin=said)) for one in ingredients]
    merge(quantized, tiny_base, bound, tmp_path / "all")
    assert read_adapter(tmp_path / "all").origin["trained_on"] == said["trained_on"]
    done = merge([quantized[0], ingredients[1]], tiny_base, bound, tmp_path / "one")
    assert "trained_on" not in read_adapter(tmp_path / "one").origin
    assert [one["trained_on"] for one in done.receipt["adapters"]] == [said["trained_on"], None]


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties", "dare"])
def test_weights_beyond_all_numbers_are_refused(
    method: str, tmp_path: Path, tiny_base: Path, bound: BaseId, ingredients: list[Ingredient]
) -> None:
    huge = [replace(one, weight=1e308) for one in ingredients]
    with pytest.raises(InputError) as caught:
        merge(huge, tiny_base, bound, tmp_path / "two", method=method)
    assert caught.value.code == "GS-3450"  # their sum is infinite
    if method != "linear":  # which divides by the weight
        with pytest.raises(InputError) as caught:
            merge(huge[:1], tiny_base, bound, tmp_path / "one", method=method)
        assert caught.value.code == "GS-3455"
        assert caught.value.fields["tensor"]
    assert not list(tmp_path.glob("one*")) + list(tmp_path.glob("two*"))
