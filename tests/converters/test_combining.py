"""Adapters of several families as one, from their files: rsLoRA of PEFT's, DoRA, PiSSA, and ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from proving import load_on, logits_of, train
from tiny_models import LLAMA_PATHS, MakeAdapter, build_llama, llama_shapes
from transformers import AutoModelForCausalLM

from converters.combining import merge_adapters
from converters.convert import convert
from converters.reading import Inputs
from gora_serve.adapter.factors import BaseId
from gora_serve.adapter.format import read_adapter
from gora_serve.config import MergeConfig
from gora_serve.errors import BindingError, MismatchError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.verify import verify_adapter
from gora_serve.training.export import export_adapter


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT's own merge adds to each weight, in float64."""
    before = {name: tensor.double() for name, tensor in build_llama().state_dict().items()}
    merged = {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}
    return {path: merged[f"{path}.weight"] - before[f"{path}.weight"] for path in LLAMA_PATHS}


def trained(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    model = train(get_peft_model(build_llama(), LoraConfig(**{"target_modules": "all-linear", **settings})), lr=1e-2)
    model.save_pretrained(folder)
    return deltas(model)


def test_families_and_scales_add_up(tmp_path: Path, tiny_base: Path, make_adapter: MakeAdapter) -> None:
    """rsLoRA with patterns, DoRA at full rank, an export of ours; loaded with PEFT on the untouched base."""
    pattern = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}}
    one = trained(tmp_path / "rslora", r=4, lora_alpha=8, **pattern)
    two = trained(tmp_path / "dora", r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "down_proj"])
    ours = make_adapter({LLAMA_PATHS[4]: 3}, shapes=llama_shapes(), scales=0.1,
                        base=BaseId(str(tiny_base), None, hash_model(tiny_base).roots))  # fmt: skip
    export_adapter(ours, tmp_path / "ours")
    weights = {"rslora": 0.5, "dora": 2.0, "ours": -1.0}
    base = Base(str(tiny_base), tiny_base)
    given = [(tmp_path / name, weight) for name, weight in weights.items()]
    done = merge_adapters(given, base, tmp_path / "out", MergeConfig(into="adapter", tolerance=0.0))
    assert verify_adapter(tmp_path / "out", base=tiny_base).root == done.root
    model = build_llama()
    for path in LLAMA_PATHS:
        delta = 0.5 * one[path] + 2.0 * two[path]
        delta -= ours.modules[path].delta() if path in ours.modules else 0.0
        module = model.get_submodule(path)
        module.weight.data = (module.weight.data.double() + delta).float()
    expected = logits_of(model)
    untouched = logits_of(AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto"))
    assert float((untouched - expected).abs().max()) > 1e-2, "the adapters do nothing: this test could not fail"
    assert float((logits_of(load_on(tiny_base, tmp_path / "out")) - expected).abs().max()) < 1e-5
    receipt = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [one["family"] for one in receipt["adapters"]] == ["lora", "dora", "lora"]
    assert receipt["adapters"][2]["adapter_root"] == verify_adapter(tmp_path / "ours").root
    assert len(done.warnings) == 1
    assert "nothing proves which base" in done.warnings[0]


def test_an_edited_base_counts(tmp_path: Path, tiny_base: Path) -> None:
    """A PiSSA adapter goes in as the update on the untouched base, not as its factors."""
    model = get_peft_model(build_llama(), LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"))
    model = train(model, lr=1e-2)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "pissa")
    merge_adapters([(tmp_path / "pissa", 1.0)], Base(str(tiny_base), tiny_base), tmp_path / "out")
    assert float((logits_of(load_on(tiny_base, tmp_path / "out")) - expected).abs().max()) < 1e-4


def test_a_base_in_4_bits_is_not_forgotten(tmp_path: Path, tiny_base: Path, make_adapter: MakeAdapter) -> None:
    said = {"trained_on": json.dumps({"quantize": "nf4"})}
    bound = BaseId(str(tiny_base), None, hash_model(tiny_base).roots)
    ours = make_adapter({LLAMA_PATHS[4]: 3}, shapes=llama_shapes(), base=bound)
    export_adapter(replace(ours, origin={**ours.origin, **said}), tmp_path / "ours")
    base = Base(str(tiny_base), tiny_base)
    done = merge_adapters([(tmp_path / "ours", 0.5), (tmp_path / "ours", 0.5)], base, tmp_path / "merged")
    assert [one["trained_on"] for one in done.receipt["adapters"]] == [said["trained_on"]] * 2
    convert(tmp_path / "ours", base, tmp_path / "converted")
    for folder in ("merged", "converted"):
        assert read_adapter(tmp_path / folder).origin["trained_on"] == said["trained_on"]
        assert "quantized to nf4" in (tmp_path / folder / "README.md").read_text()


def test_refusals(tmp_path: Path, tiny_base: Path, make_adapter: MakeAdapter) -> None:
    base = Base(str(tiny_base), tiny_base)
    trained(tmp_path / "dora", r=4, use_dora=True)
    with pytest.raises(UsageError, match="GS-231"):
        merge_adapters([(tmp_path / "dora", 1.0)], base, tmp_path / "out")
    build_llama(5).save_pretrained(tmp_path / "other")
    ranks = {LLAMA_PATHS[0]: 2}
    stranger = BaseId("other", None, hash_model(tmp_path / "other").roots)
    export_adapter(make_adapter(ranks, shapes=llama_shapes(), base=stranger), tmp_path / "stranger")
    trained(tmp_path / "lora", r=4)
    with pytest.raises(BindingError, match="GS-401") as caught:
        merge_adapters([(tmp_path / "lora", 1.0), (tmp_path / "stranger", 1.0)], base, tmp_path / "out")
    assert caught.value.what.startswith(f"{tmp_path / 'stranger'}: ")
    bound = BaseId(str(tiny_base), None, hash_model(tiny_base).roots)
    export_adapter(make_adapter(ranks, shapes=llama_shapes(), base=bound), tmp_path / "damaged")
    (tmp_path / "damaged" / "README.md").write_text("something else")
    with pytest.raises(MismatchError, match="GS-102"):
        merge_adapters([(tmp_path / "damaged", 1.0)], base, tmp_path / "out", inputs=Inputs())
    assert not (tmp_path / "out").exists()
