"""`merge --into adapter` and `export --gguf` as users run them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from shell import gora, gora_here
from tiny_models import LLAMA_PATHS, MakeAdapter, llama_shapes

from gora_serve.adapter.factors import BaseId
from gora_serve.adapter.format import read_adapter
from gora_serve.integrity.manifest import hash_model
from gora_serve.training.export import export_adapter


@pytest.fixture
def work(tmp_path: Path, tiny_base: Path, make_adapter: MakeAdapter) -> Path:
    """Two exports of one base, of unequal ranks and scales."""
    bound = BaseId(str(tiny_base), None, hash_model(tiny_base).roots)
    for name, ranks in {"one": (2, 5), "two": (4, 1)}.items():
        pairs = dict(zip(LLAMA_PATHS[:2], ranks, strict=True))
        export_adapter(
            make_adapter(pairs, shapes=llama_shapes(), seed=len(name) + ranks[0], base=bound), tmp_path / name
        )
    return tmp_path


def test_several_adapters_become_one(work: Path, tiny_base: Path) -> None:
    words = ["merge", tiny_base, "-a", f"{work / 'one'}:0.75", "-a", work / "two", "--into", "adapter"]
    told = gora(*words, "--output", work / "out")
    assert told.code == 0, told.err
    assert "ranks 6" in told.out
    assert "weight 0.75" in told.out
    one, two, out = (read_adapter(work / name).modules for name in ("one", "two", "out"))
    for path in LLAMA_PATHS[:2]:
        expected = 0.75 * one[path].delta() + two[path].delta()
        assert float((out[path].delta() - expected).norm() / expected.norm()) < 2e-7
    assert gora_here("verify", work / "out", "--base", tiny_base).code == 0
    answer = gora_here(*words, "--method", "linear", "--rank", "2", "--output", work / "mean", "--json")
    value = json.loads(answer.out)
    assert [one["applied_weight"] for one in value["adapters"]] == [0.75 / 1.75, 1 / 1.75]
    assert value["truncated"] > 0
    assert value == json.loads((work / "mean" / "merge.json").read_text()) | {
        "adapter": str(work / "mean"), "warnings": [],
    }  # fmt: skip


def test_ties_and_dare_take_a_density_and_a_seed(work: Path, tiny_base: Path) -> None:
    roots = []
    for name, more in {"a": ["--seed", "1"], "b": ["--seed", "1"], "c": ["--seed", "2"]}.items():
        words = ["merge", tiny_base, "-a", work / "one", "-a", work / "two", "--into", "adapter", "--method", "dare"]
        answer = gora_here(*words, "--density", "0.8", *more, "--output", work / name, "--json")
        roots.append(json.loads(answer.out)["adapter_root"])
    assert roots[0] == roots[1] != roots[2]
    words = ["merge", tiny_base, "-a", work / "one", "--into", "adapter", "--method", "ties", "--density", "1.5"]
    assert gora_here(*words, "--output", work / "d").gs == "GS-201"


def test_an_export_for_llama_cpp(work: Path, tiny_base: Path) -> None:
    answer = gora("export", work / "one", "--output", work / "out", "--gguf")
    assert answer.code == 0, answer.err
    assert "adapter_model.gguf for llama.cpp (llama)" in answer.out
    names = {tensor.name for tensor in gguf.GGUFReader(work / "out" / "adapter_model.gguf").tensors}
    assert names == {f"blk.0.attn_{kind}.weight.lora_{part}" for kind in "qk" for part in "ab"}
    assert gora_here("verify", work / "out", "--base", tiny_base).code == 0
    assert gora_here("export", work / "one", "--output", work / "x", "--base", tiny_base).gs == "GS-264"
    answer = gora_here("export", work / "one", "--output", work / "x", "--gguf", "--base", work / "one")
    assert (answer.code, answer.gs) == (3, "GS-366")
    assert not (work / "x").exists()
