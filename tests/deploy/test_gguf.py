"""LoRA files of llama.cpp: its names, its scale, its rows of q and k, read with the gguf package alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import LLAMA_PATHS, MakeAdapter, llama_shapes

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.config import ExportConfig
from gora_serve.deploy.gguf_file import GGUF, read_gguf, write_gguf
from gora_serve.deploy.gguf_names import ARCHITECTURES, places
from gora_serve.deploy.rope_rows import interleave, separate
from gora_serve.errors import BindingError, InputError, MachineError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.manifest import Roots, hash_model
from gora_serve.integrity.verify import verify_adapter
from gora_serve.training.export import export, export_adapter

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}  # of the tiny Llama


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(str(tiny_base), tiny_base)


def llama_cpp_name(path: str) -> str:
    layer, rest = path.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def llama_cpp_delta(reader: Any, name: str) -> np.ndarray:
    """What llama.cpp adds to its weight: alpha / rank * B A where alpha is not 0 (get_scale in llama-adapter.h)."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    alpha, rank = float(reader.get_field("adapter.lora.alpha").contents()), int(b.shape[0])  # ne[0]
    scale = alpha / rank if alpha else 1.0
    assert int(a.shape[1]) == rank
    return np.asarray(scale * (numbers(b) @ numbers(a)))


def numbers(tensor: Any) -> np.ndarray:
    data = tensor.data
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        data = gguf.dequantize(data, tensor.tensor_type)
    return np.asarray(data, dtype=np.float64)


def in_llama_cpps_rows(delta: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's converter, in numpy: what is done to the base's weight (out, in)."""
    return delta.reshape(heads, 2, delta.shape[0] // heads // 2, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-7), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_llama_cpp_reads_the_update(
    tmp_path: Path, base: Base, tiny_adapter: Adapter, dtype: Any, tolerance: float
) -> None:
    """Ranks 1, 3 and 8 and another scale for each module, in one file with one alpha."""
    done = write_gguf(tmp_path / "a.gguf", tiny_adapter, base, dtype)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    text = {key: reader.get_field(key).contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert text == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert len(reader.tensors) == 2 * len(tiny_adapter.modules)
    wrong, total = 0.0, 0.0
    for path, factors in tiny_adapter.modules.items():
        name = llama_cpp_name(path)
        expected = factors.scale * (factors.B.double() @ factors.A.double()).numpy()
        heads = HEADS.get(name.split(".")[2])
        if heads:
            expected = in_llama_cpps_rows(expected, heads)
        actual = llama_cpp_delta(reader, name)
        assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected), path
        wrong, total = wrong + np.linalg.norm(actual - expected) ** 2, total + np.linalg.norm(expected) ** 2
    assert done.error == pytest.approx((wrong / total) ** 0.5, rel=0.05)
    assert (done.architecture, done.alpha, done.modules) == ("llama", 8.0, len(tiny_adapter.modules))


def test_conv1d_and_an_untied_head_and_embeddings(tmp_path: Path, tiny_gpt2: Path, make_adapter: MakeAdapter) -> None:
    """GPT-2: llama.cpp keeps its weights as (out, in), as our updates are, and moves no rows; embeddings are turned."""
    untied = tmp_path / "gpt2"
    shutil.copytree(tiny_gpt2, untied)
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    shapes = {
        "transformer.h.1.attn.c_attn": (96, 32), "transformer.h.0.mlp.c_proj": (32, 128), "lm_head": (384, 32),
        "transformer.wte": (384, 32),
    }  # fmt: skip
    adapter = make_adapter(dict.fromkeys(shapes, 3), shapes=shapes, embeddings=frozenset({"transformer.wte"}))
    write_gguf(tmp_path / "a.gguf", adapter, Base("gpt2", untied), "float32")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    names = {"transformer.h.1.attn.c_attn": "blk.1.attn_qkv.weight",
             "transformer.h.0.mlp.c_proj": "blk.0.ffn_down.weight", "lm_head": "output.weight"}  # fmt: skip
    for path, name in names.items():
        np.testing.assert_allclose(llama_cpp_delta(reader, name), adapter.modules[path].delta().numpy(), atol=1e-6)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    # llm_graph_context::build_inp_embd: b times the token's row of a, scaled as the others
    rows = numbers(a) @ numbers(b).T
    assert (numbers(a).shape, numbers(b).shape) == ((384, 3), (32, 3))
    np.testing.assert_allclose(rows, adapter.modules["transformer.wte"].delta().numpy(), atol=1e-6)


def test_moving_rows_is_undone() -> None:
    rows = torch.arange(48.0).reshape(24, 2)
    assert torch.equal(separate(interleave(rows, 3), 3), rows)
    assert interleave(rows, 3)[:4, 0].tolist() == [0.0, 8.0, 2.0, 10.0]
    assert torch.equal(interleave(rows, 0), rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_architectures_have_names_for_their_modules(name: str) -> None:
    path = "transformer.h.1.mlp.c_fc" if name == "GPT2LMHeadModel" else "model.layers.1.mlp.down_proj"
    config = {"architectures": [name], "num_hidden_layers": 2, "num_attention_heads": 4, "n_layer": 2}
    assert places([path], config, Path("x"))[path].name in ("blk.1.ffn_down.weight", "blk.1.ffn_up.weight")


def test_export_writes_it_beside_the_rest_and_twice_the_same(
    tmp_path: Path, tiny_base: Path, tiny_adapter: Adapter
) -> None:
    named = replace(tiny_adapter, base=BaseId(str(tiny_base)))
    export_adapter(named, tmp_path / "run", ExportConfig("native"))
    done = export(tmp_path / "run", tmp_path / "out", ExportConfig(gguf=True))
    again = export(tmp_path / "run", tmp_path / "again", ExportConfig(gguf=True), base=str(tiny_base))
    assert (tmp_path / "out" / GGUF).read_bytes() == (tmp_path / "again" / GGUF).read_bytes()
    assert done.gguf == again.gguf
    assert done.gguf is not None
    assert 0 < done.gguf.error < 1e-7
    assert verify_adapter(tmp_path / "out").root == done.root
    assert read_gguf(tmp_path / "out" / GGUF, {}).keys() == {llama_cpp_name(path) for path in tiny_adapter.modules}


def test_a_base_that_has_moved(
    tmp_path: Path, tiny_base: Path, tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the path in the adapter leads nowhere from here, --base is named, and takes the fingerprint too."""
    bound = BaseId("bases/tiny", None, hash_model(tiny_base).roots)
    export_adapter(replace(tiny_adapter, base=bound), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MachineError, match=r"(?s)GS-521.*--base BASE.*bases/tiny"):
        export(tmp_path / "run", tmp_path / "out", ExportConfig(gguf=True))
    done = export(tmp_path / "run", tmp_path / "out", ExportConfig(gguf=True), base=str(tiny_base))
    assert done.canary.startswith("stored")


def test_what_llama_cpp_cannot_hold_is_refused_with_its_name(
    tmp_path: Path, base: Base, tiny_adapter: Adapter, make_adapter: MakeAdapter, tiny_gpt2: Path, tiny_t5: Path
) -> None:
    def refused(adapter: Adapter, code: str, name: str, on: Base = base) -> None:
        with pytest.raises(InputError, match=rf"(?s){code}.*{name}"):
            write_gguf(tmp_path / "a.gguf", adapter, on, "float32")
        assert not (tmp_path / "a.gguf").exists()

    refused(tiny_adapter, "GS-3460", "T5ForConditionalGeneration", Base("t5", tiny_t5))
    refused(make_adapter({"model.layers.5.mlp.up_proj": 2}), "GS-3461", r"layers\.5\.mlp\.up_proj")
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    refused(make_adapter({expert: 2}), "GS-3461", r"experts\.0\.w1")
    refused(make_adapter({"lm_head": 2}), "GS-3461", "lm_head", Base("gpt2", tiny_gpt2))
    refused(replace(tiny_adapter, carried={"score.weight": torch.ones(2, 32)}), "GS-3462", r"score\.weight")
    rows = LoraFactors(torch.ones(1, 32), torch.ones(12, 1), 1.0)
    refused(replace(tiny_adapter, modules={LLAMA_PATHS[0]: rows}), "GS-3461", "q_proj")


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, base: Base, tiny_adapter: Adapter) -> None:
    path = LLAMA_PATHS[2]
    shape = llama_shapes()[path]
    for value in (1e6, 1e-9):  # overflow; and an update that float16 rounds away, which reading back finds
        factors = LoraFactors(torch.full((1, shape[1]), 1.0), torch.full((shape[0], 1), value), 1.0)
        with pytest.raises(InputError, match=r"(?s)GS-3463.*v_proj"):
            write_gguf(tmp_path / f"{value}.gguf", replace(tiny_adapter, modules={path: factors}), base, "float16")


def test_a_file_that_holds_something_else_is_found_out(
    tmp_path: Path, base: Base, tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gguf package that wrote the rows in the base's order would be found when the file is read back."""
    monkeypatch.setattr("gora_serve.deploy.gguf_file.interleave", lambda rows, heads: rows)
    with pytest.raises(InputError, match=r"(?s)GS-3463.*[qk]_proj"):
        write_gguf(tmp_path / "a.gguf", tiny_adapter, base, "float32")


def test_another_bases_configuration_is_refused(tmp_path: Path, base: Base, tiny_adapter: Adapter) -> None:
    roots = Roots("gw1:sha256:" + "1" * 64, "gc1:sha256:" + "2" * 64)
    with pytest.raises(BindingError, match="GS-4452"):
        write_gguf(tmp_path / "a.gguf", replace(tiny_adapter, base=BaseId("x", None, roots)), base, "float32")


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, base: Base, tiny_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"(?s)GS-5450.*gora-serve\[gguf\]"):
        write_gguf(tmp_path / "a.gguf", tiny_adapter, base, "float32")
