"""Adapters that vLLM would serve wrongly, or refuse only after a slow start: every fault is named, all at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gora_serve.errors import InputError, MachineError
from gora_serve.serving.adapter_dir import read_adapter_dir
from gora_serve.serving.preflight import check_adapter, form_of
from gora_serve.serving.served import read_served_adapters

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
WriteAdapter = Callable[..., Path]


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def faults(folder: Path) -> list[tuple[str, str | None]]:
    return [(fault.code, fault.key) for fault in check_adapter(read_adapter_dir("a", folder))]


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_plain_adapters_pass(write_adapter: WriteAdapter, init: object) -> None:
    config = {"init_lora_weights": init, "use_rslora": True, "modules_to_save": None}
    assert faults(write_adapter("a", {Q: 3, K: 8}, config=config)) == []


def test_embedding_factors_pass(write_adapter: WriteAdapter) -> None:
    extra = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 50), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.zeros((12, 3), np.float32),
    }
    assert faults(write_adapter("a", {Q: 3}, tensors=extra)) == []


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "gora", "PiSSA"])
def test_initialisations_that_edit_the_base(write_adapter: WriteAdapter, init: str) -> None:
    assert faults(write_adapter("a", {Q: 3}, config={"init_lora_weights": init})) == [("GS-383", "init_lora_weights")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True), ("lora_bias", True), ("bias", "all"), ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 1]]), ("trainable_token_indices", [1]), ("peft_type", "VERA"),
    ],
)  # fmt: skip
def test_features_that_are_not_served(write_adapter: WriteAdapter, name: str, value: object) -> None:
    assert faults(write_adapter("a", {Q: 3}, config={name: value})) == [("GS-382", name)]


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"r": 0}, "r"),
        ({"r": True}, "r"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern[q_proj]"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern[(]"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern[(a+)+b]"),
    ],
)
def test_malformed_numbers_and_patterns(write_adapter: WriteAdapter, config: dict[str, Any], where: str) -> None:
    assert ("GS-381", where) in faults(write_adapter("a", {Q: 3}, config=config))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({key(K, "B"): None}, ("GS-384", K)),
        ({key(K, "A"): None}, ("GS-384", K)),
        ({key(K, "B"): np.zeros((6, 4), np.float32)}, ("GS-386", K)),
        ({key(K, "A"): np.zeros((3, 4, 2), np.float32)}, ("GS-386", K)),
        ({key(K, "A"): np.zeros((3, 12), np.int32)}, ("GS-386", key(K, "A"))),
        ({"base_model.model.lm_head.base_layer.weight": np.zeros((2, 2), np.float32)},
         ("GS-385", "base_model.model.lm_head.base_layer.weight")),
        ({f"base_model.model.{Q}.lora_magnitude_vector": np.zeros(2, np.float32)},
         ("GS-385", f"base_model.model.{Q}.lora_magnitude_vector")),
        ({f"base_model.model.{Q}.lora_B.bias": np.zeros(2, np.float32)},
         ("GS-385", f"base_model.model.{Q}.lora_B.bias")),
        ({f"base_model.model.{Q}.lora_A.default.weight": np.zeros((3, 12), np.float32)},
         ("GS-385", f"base_model.model.{Q}.lora_A.default.weight")),
        ({f"base_model.model.{Q}.lora_embedding_A": np.ones((3, 12), np.float32)},  # vLLM takes the last of both
         ("GS-385", f"base_model.model.{Q}.lora_embedding_A")),
    ],
)  # fmt: skip
def test_faulty_tensors(write_adapter: WriteAdapter, tensors: dict[str, Any], expected: tuple[str, str]) -> None:
    assert faults(write_adapter("a", {Q: 3, K: 3}, tensors=tensors)) == [expected]


def test_a_file_without_factors(write_adapter: WriteAdapter) -> None:
    assert faults(write_adapter("a", {Q: 3}, tensors={key(Q, "A"): None, key(Q, "B"): None})) == [("GS-385", None)]


def test_rank_above_the_largest(write_adapter: WriteAdapter) -> None:
    assert faults(write_adapter("a", {Q: 513})) == [("GS-387", Q)]


def test_rank_patterns_follow_peft(write_adapter: WriteAdapter) -> None:
    """A key matches the end of a path from a dot on; the first key that matches wins."""
    config = {"r": 3, "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "q_proj": 7}}
    ranks = {Q: 5, "model.layers.10.self_attn.q_proj": 7, K: 3}
    assert faults(write_adapter("a", ranks, config=config)) == []


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({}, "plain"),
        ({"lora_alpha": 3}, "unit"),
        ({"use_rslora": True}, "native"),
        ({"rank_pattern": {}, "r": 3, "lora_alpha": 3}, "uniform"),
        ({"rank_pattern": {}, "r": 3, "lora_alpha": 6}, "uniform"),
        ({"rank_pattern": {}, "r": 3, "use_rslora": True}, "uniform"),
    ],
)
def test_the_form_is_what_the_configuration_says(
    write_adapter: WriteAdapter, config: dict[str, object], form: str
) -> None:
    """Padded ranks cannot be told from ranks that are alike."""
    assert form_of(read_adapter_dir("a", write_adapter("a", {Q: 3, K: 3}, config=config))) == form


def test_all_faults_of_all_adapters_come_at_once(write_adapter: WriteAdapter) -> None:
    first = write_adapter("first", {Q: 3, K: 3}, config={"use_dora": True}, tensors={key(K, "B"): None})
    second = write_adapter("second", {Q: 3})
    (second / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InputError) as caught:
        read_served_adapters([("a", first), ("b", second)])
    for part in ("3 faults", "use_dora", K, str(second / "adapter_model.safetensors")):
        assert part in str(caught.value)
    assert len(caught.value.faults) == 3
    assert caught.value.to_json()["error"]["faults"] == list(caught.value.faults)  # type: ignore[index]


@pytest.mark.parametrize("content", ["[]", "{", "\x00", '{"a": ' + "[" * 100_000])
def test_configurations_that_cannot_be_read(write_adapter: WriteAdapter, content: str) -> None:
    folder = write_adapter("a", {Q: 3})
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match=r"GS-(381|319|320)"):
        read_served_adapters([("a", folder)])


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(write_adapter: WriteAdapter, missing: str) -> None:
    folder = write_adapter("a", {Q: 3})
    (folder / missing).unlink()
    with pytest.raises(MachineError, match="GS-583"):
        read_served_adapters([("a", folder)])


def test_serving_imports_the_standard_library_only() -> None:
    code = (
        "import sys, gora_serve.serving.engine, gora_serve.serving.plan, gora_serve.training.demo_base;"
        "print(sorted({'torch', 'vllm', 'transformers', 'peft', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"
