"""LoRA-GA of PEFT, and the official fork's files rebuilt: its √2, its patterns, its init_lora_checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inits import PATTERNS, Run, edit_config, gradient_of, inputs_of, make_run, prove_exact_as
from peft import LoraConfig
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from proving import converted, load_on, logits_of, off_by
from safetensors.torch import load_file, save_file
from tiny_models import build_gpt2, build_llama

from converters.reading import Inputs
from gora_serve.errors import BindingError, InputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")  # of preprocess_loraga


def make_lora_ga(folder: Path, *, gradient_seed: int = 7, seed: int = 0, **settings: Any) -> Run:
    """seed: of the randomized SVD of the gradient."""

    def prepare(model: Any, config: LoraConfig) -> None:
        preprocess_loraga(model, config, gradient_of(model, gradient_seed))
        torch.manual_seed(seed)

    options: Any = LoraGAConfig(direction="ArB2r", stable_gamma=1)
    return make_run(folder, "lora_ga", prepare=prepare, lora_ga_config=options, **settings)


@pytest.mark.parametrize("way", ["init", "mutated", "both"])
@pytest.mark.parametrize("settings", [{}, PATTERNS])
def test_lora_ga(tmp_path: Path, tiny_base: Path, settings: dict[str, Any], way: str) -> None:
    run = make_lora_ga(tmp_path, **settings)
    prove_exact_as(run, tiny_base, tmp_path, "lora_ga", inputs_of(run, way))
    converted(run.adapter, tiny_base, tmp_path / "wrong", family="lora")
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "wrong")), run.trained) > 0.001


def test_an_edited_base_that_is_named_is_no_other_base(tmp_path: Path, tiny_base: Path) -> None:
    run = make_lora_ga(tmp_path)
    for named, told in ((run.mutated, "nothing proves"), ("org/other-model", "org/other-model")):
        edit_config(run.adapter, base_model_name_or_path=str(named))
        done = converted(
            run.adapter, tiny_base, tmp_path / told[-5:], inputs=inputs_of(run, "mutated"), family="lora_ga"
        )
        assert [told in line for line in done.warnings] == [True]


@pytest.mark.parametrize("way", ["init", "mutated", "both"])
def test_conv1d(tmp_path: Path, tiny_gpt2: Path, way: str) -> None:
    run = make_lora_ga(tmp_path, build=build_gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    prove_exact_as(run, tiny_gpt2, tmp_path, "lora_ga", inputs_of(run, way))


def test_without_its_files_it_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    run = make_lora_ga(tmp_path)
    with pytest.raises(UsageError, match="cannot be computed again") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", family="lora_ga")
    assert "--init-adapter DIR or --mutated-base DIR" in str(refused.value)


def test_initial_adapters_of_other_runs(tmp_path: Path, tiny_base: Path) -> None:
    """Another gradient, plain LoRA, the same run after training, another rank: none of them is taken."""
    run = make_lora_ga(tmp_path)
    shutil.copytree(run.initial, tmp_path / "scale")
    edit_config(tmp_path / "scale", lora_alpha=16)
    others = [
        ("GS-431", make_lora_ga(tmp_path / "gradient", gradient_seed=11).initial),
        ("GS-431", make_lora_ga(tmp_path / "seed", seed=99).initial),  # the same gradient
        ("GS-431", make_run(tmp_path / "plain", True).adapter),
        ("GS-438", tmp_path / "plain" / "initial"),
        ("GS-430", make_lora_ga(tmp_path / "rank", r=2).initial),
        ("GS-430", tmp_path / "scale"),
        ("GS-433", run.adapter),
    ]
    for code, other in others:
        with pytest.raises(BindingError) as refused:
            converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(init_adapter=other), family="lora_ga")
        assert refused.value.code == code, other
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS])
def test_the_forks_final_adapter(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    """[B, -B0] [A; A0] with r and alpha doubled, patterns as they were: √2 too strong under rsLoRA."""
    run = make_lora_ga(tmp_path, **settings)
    trained, initial = (load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, run.initial))
    final = {
        name: torch.cat([tensor, initial[name]]) if "lora_A" in name else torch.cat([tensor, -initial[name]], dim=1)
        for name, tensor in trained.items()
    }
    fork = shutil.copytree(run.adapter, tmp_path / "fork")
    save_file(final, fork / "adapter_model.safetensors")
    edit_config(fork, peft_type="LORAGA", init_lora_weights=True, r=8, lora_alpha=16, lora_ga_config=None)
    run = Run(fork, run.initial, run.mutated, run.trained)
    done = prove_exact_as(run, tiny_base, tmp_path, "lora_ga")
    assert done.reading.served is None
    assert any("√2" in note for note in done.reading.notes) == ("use_rslora" in settings)
    save_file({name: torch.randn_like(tensor) for name, tensor in final.items()}, fork / "adapter_model.safetensors")
    with pytest.raises(InputError, match="no trained adapter less its initial one") as refused:
        converted(fork, tiny_base, tmp_path / "other", family="lora_ga")
    assert refused.value.code == "GS-3132"


def test_the_forks_checkpoint_brings_its_initial_adapter(tmp_path: Path, tiny_base: Path) -> None:
    run = make_lora_ga(tmp_path)
    shutil.copytree(run.initial, run.adapter / "init_lora_checkpoint")
    for folder in (run.adapter, run.adapter / "init_lora_checkpoint"):
        edit_config(folder, peft_type="LORAGA")
    done = prove_exact_as(run, tiny_base, tmp_path, "lora_ga")
    assert "init_lora_checkpoint" in done.reading.method


@pytest.mark.parametrize("way", ["init", "mutated", "both"])
def test_bfloat16(tmp_path: Path, way: str) -> None:
    base = tmp_path / "base"
    build_llama().to(torch.bfloat16).save_pretrained(base)
    run = make_lora_ga(tmp_path, dtype=torch.bfloat16)
    done = converted(run.adapter, base, tmp_path / "out", inputs=inputs_of(run, way), family="lora_ga")
    assert done.error < 1e-6
