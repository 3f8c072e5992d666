"""Adapter folders: PEFT loads every form and computes what a base with the update written into its weights computes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import MakeAdapter, build_gpt2, build_llama, llama_shapes

from gora_serve.adapter.engine_ranks import ENGINE_RANKS
from gora_serve.adapter.factors import Adapter, BaseId
from gora_serve.adapter.format import cast, read_adapter, to_form, write_adapter
from gora_serve.config import Form
from gora_serve.errors import GoraError, InputError
from gora_serve.integrity.manifest import Roots

FORMS: tuple[Form, ...] = ("unit", "padded", "native")
TOKENS = torch.arange(3, 51).reshape(2, 24)
GPT2_SHAPES = {"c_attn": (96, 32), "c_proj": (32, 32), "c_fc": (128, 32)}


def gpt2_adapter(make_adapter: MakeAdapter) -> Adapter:
    """Conv1D everywhere, with another c_proj in attention (32 -> 32) and MLP (128 -> 32); one module absent."""
    paths = [f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    shapes = {p: (32, 128) if p.endswith("mlp.c_proj") else GPT2_SHAPES[p.rsplit(".", 1)[-1]] for p in paths}
    ranks = {path: (3, 1, 8)[index % 3] for index, path in enumerate(paths[:-1])}
    return make_adapter(ranks, shapes=shapes, fan_in_fan_out=True)


def write(folder: Path, adapter: Adapter, form: Form, **options: Any) -> Path:
    folder.mkdir(parents=True)
    write_adapter(folder, adapter, form, **options)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def reference_logits(model: Any, adapter: Adapter) -> torch.Tensor:
    """Logits with W + scale B A written into the weights, all in float64; no LoRA code takes part."""
    model.double()
    for path, factors in adapter.modules.items():
        weight = model.get_submodule(path).weight
        delta = factors.scale * (factors.B.double().numpy() @ factors.A.double().numpy())
        delta = delta.T if adapter.fan_in_fan_out else delta
        weight.data = weight + torch.from_numpy(np.ascontiguousarray(delta))
    return logits(model)


def load_with_peft(model: Any, folder: Path) -> Any:
    """PEFT reports missing and unexpected keys, and much else, as warnings: there must be none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(model, folder).eval()


def weaker(adapter: Adapter, factor: float) -> Adapter:
    """The same adapter with a smaller update: a large one makes float32 noise of the base's own layers grow."""
    modules = {path: replace(factors, B=factors.B * factor) for path, factors in adapter.modules.items()}
    return replace(adapter, modules=modules)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_computes_what_the_edited_weights_compute(
    tmp_path: Path, tiny_adapter: Adapter, make_adapter: MakeAdapter, form: Form, family: str
) -> None:
    adapter = weaker(tiny_adapter if family == "llama" else gpt2_adapter(make_adapter), 0.2)
    build: Callable[[], Any] = build_llama if family == "llama" else build_gpt2
    expected = reference_logits(build(), adapter)
    model = load_with_peft(build(), write(tmp_path / "adapter", adapter, form))
    single = logits(model)  # float32
    assert (logits(model.double()) - expected).abs().max() < 1e-5
    native = load_with_peft(build(), write(tmp_path / "native", adapter, "native"))
    assert (single - logits(native)).abs().max() < 1e-5, "in float32 too, the form changes nothing"
    assert (expected - logits(build())).abs().max() > 0.1, "the update must matter for the test to mean anything"


@pytest.mark.parametrize("form", FORMS)
def test_peft_sees_the_ranks_that_the_form_promises(tmp_path: Path, tiny_adapter: Adapter, form: Form) -> None:
    model = load_with_peft(build_llama(), write(tmp_path / "adapter", tiny_adapter, form))
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(tiny_adapter.modules)
    for path, layer in layers.items():
        rank = layer.lora_A["default"].weight.shape[0]
        assert rank == layer.r["default"] == (8 if form == "padded" else tiny_adapter.ranks[path])
        scale = tiny_adapter.modules[path].scale if form == "native" else 1.0
        assert layer.scaling["default"] == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_back_as_the_same_update(tmp_path: Path, tiny_adapter: Adapter, form: Form) -> None:
    back = read_adapter(write(tmp_path / "adapter", tiny_adapter, form))
    assert set(back.modules) == set(tiny_adapter.modules)
    for path, factors in tiny_adapter.modules.items():
        delta = factors.scale * (factors.B.double() @ factors.A.double())
        torch.testing.assert_close(back.modules[path].delta(), delta, rtol=1e-6, atol=1e-6)
    if form != "padded":
        assert back.ranks == tiny_adapter.ranks
    if form == "native":
        assert all(torch.equal(back.modules[p].A, f.A) for p, f in tiny_adapter.modules.items())
        assert all(torch.equal(back.modules[p].B, f.B) for p, f in tiny_adapter.modules.items())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(
        st.sampled_from([f"m.{i}.{n}" for i in (0, 1, 11) for n in ("q", "k.q")]),
        st.tuples(st.integers(1, 12), st.floats(0.01, 64)),
        min_size=1,
    ),
    form=st.sampled_from(FORMS),
    rslora=st.booleans(),
    fan=st.booleans(),
)
def test_read_of_write_is_the_same_adapter(
    tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter, values: dict[str, tuple[int, float]],
    form: Form, rslora: bool, fan: bool,
) -> None:  # fmt: skip
    ranks = {path: value[0] for path, value in values.items()}
    scales = {path: 16 / rank**0.5 if rslora else values[path][1] for path, rank in ranks.items()}
    base = BaseId("org/name", "abc", Roots("gb1:sha256:" + "0" * 64, None, "gt1:sha256:" + "1" * 64))
    adapter = make_adapter(
        ranks, scales=scales, base=base, origin={"method": "gora", "data": "größe"}, fan_in_fan_out=fan
    )
    back = read_adapter(write(tmp_path_factory.mktemp("round") / "adapter", adapter, form))
    assert (back.base, back.origin, back.fan_in_fan_out) == (base, adapter.origin, fan)
    assert back.task_type == "CAUSAL_LM"
    assert set(back.modules) == set(adapter.modules)
    for path, factors in adapter.modules.items():
        expected = factors.scale * (factors.B.double() @ factors.A.double())
        difference = float((back.modules[path].delta() - expected).norm() / expected.norm())
        assert difference < (1e-10 if form == "native" else 1e-6)
    if form == "padded":
        assert set(back.ranks.values()) == {min(rank for rank in ENGINE_RANKS if rank >= max(ranks.values()))}
    else:
        assert back.ranks == ranks


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.format import write_adapter
g = torch.Generator().manual_seed(0)
order = list({f"model.layers.{i}.{n}" for i in range(3) for n in ("q", "k", "v")})  # a set: hash order
modules = {}
for path in sorted(order):
    rank = 1 + len(path) % 3 + int(path[13])
    modules[path] = LoraFactors(torch.randn(rank, 8, generator=g), torch.randn(6, rank, generator=g), 16 / rank**0.5)
adapter = Adapter({p: modules[p] for p in order}, BaseId("b"), origin={k: k for k in {"a", "b", "c"}})
write_adapter(Path(sys.argv[2]), adapter, sys.argv[3])
"""


def test_written_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[2]), str(folder), "unit"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_safetensors_library_reads_the_file(tmp_path: Path, tiny_adapter: Adapter, dtype: torch.dtype) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "native", dtype=dtype)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.keys()) == 2 * len(tiny_adapter.modules)
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, factors in tiny_adapter.modules.items():
        assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], factors.A.to(dtype))
        assert torch.equal(tensors[f"base_model.model.{path}.lora_B.weight"], factors.B.to(dtype))


def test_unit_form_rounds_the_folded_product_once(tmp_path: Path, tiny_adapter: Adapter) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "unit", dtype=torch.float16)
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, factors in tiny_adapter.modules.items():
        expected = (factors.B.double() * factors.scale).float().half()
        assert torch.equal(tensors[f"base_model.model.{path}.lora_B.weight"], expected)


@pytest.mark.parametrize("form", FORMS)
def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, make_adapter: MakeAdapter, form: Form) -> None:
    adapter = make_adapter({"m": 2}, scales=1.0)
    adapter.modules["m"].B[0, 0] = 70000.0
    with pytest.raises(InputError, match="GS-358") as caught:
        write(tmp_path / "adapter", adapter, form, dtype=torch.float16)
    assert caught.value.fields["tensor"] == "m"
    assert not list((tmp_path / "adapter").iterdir()), "nothing may be written"
    write(tmp_path / "wider", adapter, form, dtype=torch.bfloat16)


def test_a_scale_that_overflows_when_it_is_folded_is_refused(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter({"m": 2}, scales=16.0)
    adapter.modules["m"].B[0, 0] = 30000.0
    with pytest.raises(InputError, match="GS-358"):
        write(tmp_path / "adapter", adapter, "unit", dtype=torch.float16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_tensors_is_refused(make_adapter: MakeAdapter, value: float) -> None:
    adapter = make_adapter({"m": 2})
    adapter.modules["m"].A[1, 1] = value
    with pytest.raises(InputError, match="GS-358"):
        cast(adapter, torch.float32).modules["m"]


def test_padded_form_stops_at_what_engines_hold(make_adapter: MakeAdapter) -> None:
    assert set(to_form(make_adapter({"a": 9, "b": 2}), "padded").ranks.values()) == {16}
    with pytest.raises(InputError, match="GS-357"):
        to_form(make_adapter({"a": 513}, shapes={"a": (600, 600)}), "padded")


def test_an_adapter_without_modules_is_refused(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    with pytest.raises(InputError, match="GS-359"):
        write(tmp_path / "adapter", make_adapter({}), "unit")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[KEY.format("B")]


def add_foreign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)


def add_rootless(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lora_A.weight"] = torch.ones(2, 2)
    tensors["base_model.model.lora_B.weight"] = torch.ones(2, 2)


def add_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("magnitude_vector")] = torch.ones(32)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A")] = torch.ones(5, 32)


def flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A")] = torch.ones(32)


def scalar(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A")] = torch.tensor(1.0)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A")] = tensors[KEY.format("A")].to(torch.int32)


def add_twin(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A").replace("lora_A.weight", "lora_embedding_A")] = tensors[KEY.format("A")] + 1


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    "edit", [drop, add_foreign, add_rootless, add_magnitude, add_twin, widen, flatten, scalar, integers, empty]
)
def test_tensors_that_are_no_plain_lora_are_refused(
    tmp_path: Path, tiny_adapter: Adapter, edit: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "native")
    edit_tensors(folder, edit)
    with pytest.raises(InputError) as caught:
        read_adapter(folder)
    assert caught.value.code in {"GS-352", "GS-354", "GS-359", "GS-361", "GS-362"}


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"r": 4}, {"rank_pattern": {".*": 8}}, {"lora_alpha": "16", "alpha_pattern": {}},
     {"init_lora_weights": "pissa_niter_4"}, {"peft_type": "ADALORA"}],
)  # fmt: skip
def test_configs_that_are_no_plain_lora_are_refused(
    tmp_path: Path, make_adapter: MakeAdapter, changes: dict[str, Any]
) -> None:
    folder = write(tmp_path / "adapter", make_adapter({"a": 8, "b": 8}, scales=1.0), "native")
    edit_config(folder, **changes)
    with pytest.raises(InputError):
        read_adapter(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"r": NaN}', b"\xff", b'{"r": 1, "r": 2}', b"[" * 100000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, tiny_adapter: Adapter, content: bytes) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "unit")
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, tiny_adapter: Adapter, name: str) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "unit")
    (folder / name).unlink()
    with pytest.raises(GoraError, match=name):
        read_adapter(folder)


def test_a_truncated_weights_file_is_refused(tmp_path: Path, tiny_adapter: Adapter) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "unit")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError):
        read_adapter(folder)


@pytest.mark.parametrize("record", ["[]", "nonsense", '{"schema": "gora-serve/adapter/99"}', '{"schema": "gora-serve/adapter/1", "base": 7}'])  # noqa: E501  # fmt: skip
def test_a_foreign_record_is_refused(tmp_path: Path, tiny_adapter: Adapter, record: str) -> None:
    folder = write(tmp_path / "adapter", tiny_adapter, "unit")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "gora_serve": record})
    with pytest.raises(InputError):
        read_adapter(folder)


def test_every_module_of_tiny_base_is_covered_but_one(tiny_adapter: Adapter) -> None:
    assert len(tiny_adapter.modules) == len(llama_shapes()) - 1
    assert set(tiny_adapter.ranks.values()) == {1, 3, 8}
    assert replace(tiny_adapter).parameters == sum(
        rank * sum(llama_shapes()[path]) for path, rank in tiny_adapter.ranks.items()
    )


def test_saved_modules_and_embeddings_come_back(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    shapes = {"model.embed_tokens": (40, 8), "model.layers.0.q_proj": (8, 8)}
    adapter = make_adapter(
        {"model.embed_tokens": 3, "model.layers.0.q_proj": 2}, shapes=shapes, scales=2.0,
        embeddings=frozenset({"model.embed_tokens"}),
        carried={"score.weight": torch.randn(4, 8).bfloat16(), "score.bias": torch.arange(4).float()},
    )  # fmt: skip
    folder = tmp_path / "adapter"
    write(folder, adapter, "unit")
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in keys
    assert "base_model.model.score.bias" in keys
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    back = read_adapter(folder)
    assert back.embeddings == {"model.embed_tokens"}
    assert back.carried.keys() == adapter.carried.keys()
    assert all(torch.equal(back.carried[name], tensor) for name, tensor in adapter.carried.items())
    for path, factors in adapter.modules.items():
        torch.testing.assert_close(back.modules[path].delta(), factors.delta(), rtol=1e-6, atol=1e-6)
