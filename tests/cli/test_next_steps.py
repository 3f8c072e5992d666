"""Messages that name the next step: what to give instead, and a command that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shell import gora_here
from tiny_models import build_llama

PROJECTION = "model.layers.0.mlp.up_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Plain LoRA of another tool, without a manifest."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shapes = {"A": (2, 32), "B": (64, 2)}
    key = f"base_model.model.{PROJECTION}.lora"
    save_file({f"{key}_{part}.weight": torch.ones(shape) for part, shape in shapes.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [PROJECTION], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rank", "0"), "--rank 16"), (("--rank", "-1"), "--rank 16"), (("--tolerance", "nan"), "--tolerance 0.01"),
        (("--rank", "4", "--tolerance", "0.1"), "leave one"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(
    adapter: Path, tiny_base: Path, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    answer = gora_here("convert", adapter, "--base", tiny_base, "--output", tmp_path / "out", *words)
    assert (answer.code, answer.gs) == (2, "GS-201")
    assert says in str(answer.field("try"))


def test_a_rank_of_a_plan(tiny_base: Path) -> None:
    answer = gora_here("plan", tiny_base, "--rank", "0")
    assert (answer.code, answer.gs) == (2, "GS-201")
    assert str(answer.field("try")).startswith("gora-serve plan --help ")


def test_an_adapter_without_a_manifest(adapter: Path) -> None:
    answer = gora_here("verify", adapter)
    assert (answer.code, answer.gs) == (3, "GS-332")
    assert all(f"gora-serve {command}" in str(answer.field("try")) for command in ("bind", "convert"))


def test_another_type_of_adapter_is_one_fault(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Numbers that LoRA would need, and LoHa or AdaLoRA spell otherwise, are no trail to follow."""
    for kind, others in (("LOHA", {"alpha": 8}), ("ADALORA", {"rank_pattern": {PROJECTION: [True, False]}})):
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2, **others}))
        answer = gora_here("bind", adapter, "--base", tiny_base, "--output", tmp_path / "out")
        assert answer.gs == "GS-382"
        assert "lora_alpha" not in answer.err
        assert "rank_pattern" not in answer.err
        assert "gora-serve convert" in str(answer.field("try"))


def test_a_whole_model_is_no_adapter(tmp_path: Path, tiny_base: Path) -> None:
    build_llama().save_pretrained(tmp_path / "model")
    answer = gora_here("bind", tmp_path / "model", "--base", tiny_base, "--output", tmp_path / "out")
    assert (answer.code, answer.gs) == (3, "GS-3195")
    assert f"gora-serve convert {tmp_path / 'model'} --from full" in str(answer.field("try"))


def test_a_configuration_is_no_adapter(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_config.json"
    answer = gora_here("convert", file, "--base", tiny_base, "--output", tmp_path / "out")
    assert (answer.code, answer.gs) == (3, "GS-3196")
    assert answer.field("try") == f"give the folder: {adapter}"


def test_a_folder_for_an_output_is_made(tmp_path: Path, tiny_base: Path) -> None:
    assert gora_here("hash", tiny_base, "--output", tmp_path / "no" / "dir" / "x.json").code == 0
    assert (tmp_path / "no" / "dir" / "x.json").is_file()
    assert gora_here("hash", tiny_base, "--oms", tmp_path / "oms" / "x.json").code == 0


def test_a_file_in_the_way_of_an_output(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    for words in (("hash", tiny_base), ("convert", adapter, "--base", tiny_base)):
        answer = gora_here(*words, "--output", tmp_path / "afile" / "sub" / "x")
        assert (answer.code, answer.gs) == (5, "GS-505")
        assert answer.field("file") == str(tmp_path / "afile" / "sub" / "x")
        assert answer.field("actual") == str(tmp_path / "afile")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc here")
def test_an_output_where_nobody_can_write(adapter: Path, tiny_base: Path) -> None:
    answer = gora_here("convert", adapter, "--base", tiny_base, "--output", "/proc/gora-out")
    assert (answer.code, answer.gs) == (5, "GS-505")
    assert answer.field("file") == "/proc/gora-out"
    assert not Path("/proc/gora-out").exists()


@pytest.mark.parametrize("command", ["verify", "bind"])
def test_a_file_where_a_folder_is_needed(adapter: Path, tiny_base: Path, tmp_path: Path, command: str) -> None:
    words = ("--base", tiny_base, "--output", tmp_path / "out") if command == "bind" else ()
    answer = gora_here(command, adapter / "adapter_config.json", *words)
    assert answer.code == 2
    assert "give the folder that it lies in" in answer.err
    output = gora_here("bind", adapter, "--base", tiny_base, "--output", adapter / "adapter_config.json")
    assert output.code == 2
    assert "choose another name" in output.err


def test_ranks_above_those_of_the_engine(tmp_path: Path) -> None:
    """A rank above 512 is written, with a warning; serving refuses it with a way out."""
    sizes = {"hidden_size": 544, "intermediate_size": 544, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = build_llama(**sizes)
    base.save_pretrained(tmp_path / "base")
    base.get_submodule(PROJECTION).weight.data += torch.randn(544, 544, generator=torch.Generator().manual_seed(0))
    base.save_pretrained(tmp_path / "model")
    words = ("convert", tmp_path / "model", "--base", tmp_path / "base", "--output", tmp_path / "out")
    answer = gora_here(*words, "--tolerance", "0.001")
    assert answer.code == 0
    assert "512, the largest that vLLM serves" in answer.err
    served = gora_here("bind", tmp_path / "out", "--base", tmp_path / "base", "--output", tmp_path / "bound")
    assert served.gs == "GS-387"
    assert "a lower --rank, or a larger --tolerance" in str(served.field("try"))


def test_many_names_are_counted(tmp_path: Path, tiny_base: Path) -> None:
    model = build_llama()
    for name, parameter in model.named_parameters():
        if "norm" in name or "up_proj" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "model")
    words = ("convert", tmp_path / "model", "--base", tiny_base, "--output", tmp_path / "out", "--rank", "2")
    told = gora_here(*words, "--carry", "norm").out
    assert "and 1 more (tensors.carried in conversion.json)" in told
    left = gora_here(*words, "--leave-out", "norm", "--overwrite").out
    assert "tensors.without_effect in conversion.json" in left


def test_patterns_of_another_tool_have_a_way_to_an_export(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """export says convert, also after bind; and convert does it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    patterns = {"use_rslora": True, "rank_pattern": {"q_proj": config["r"]}, "alpha_pattern": {"q_proj": 3}}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **patterns}))
    answer = gora_here("export", adapter, "--output", tmp_path / "one")
    assert answer.gs == "GS-332"
    assert "convert makes a copy that can be verified and exported" in str(answer.field("try"))
    assert gora_here("bind", adapter, "--base", tiny_base, "--output", tmp_path / "bound").code == 0
    answer = gora_here("export", tmp_path / "bound", "--output", tmp_path / "one")
    assert answer.gs == "GS-353"
    assert "gora-serve convert" in str(answer.field("try"))
    answer = gora_here("convert", tmp_path / "bound", "--base", tiny_base, "--output", tmp_path / "converted")
    assert answer.code == 0, answer.err
    assert gora_here("export", tmp_path / "converted", "--output", tmp_path / "one").code == 0


def test_a_damaged_folder_is_written_again_by_what_made_it(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert gora_here("merge", tiny_base, "-a", adapter, "--output", tmp_path / "out").code == 0
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    answer = gora_here("verify", tmp_path / "out")
    assert answer.gs == "GS-102"
    assert "export" not in str(answer.field("try"))


def test_base_as_is_for_merged_models(adapter: Path) -> None:
    answer = gora_here("verify", adapter, "--base-as", "nf4")
    assert (answer.code, answer.gs) == (2, "GS-264")
    assert "-a ADAPTER" in str(answer.field("try"))
