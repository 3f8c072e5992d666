"""The sources of the initial update: their order, their agreement, and the wrong ones that are noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inits import LINEAR, Run, inputs_of, make_run, prove_exact_as
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from proving import converted, copy_embeddings_to_head, train
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from converters.convert import convert
from converters.decompose import nearest
from converters.gap import find_gap
from converters.mutated import MutatedBase
from converters.reading import Inputs
from gora_serve.adapter.linalg import distance, norm
from gora_serve.config import GapConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import BindingError, InputError, MismatchError, UsageError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.binding import seal_folder
from gora_serve.progress import Progress

PATH = "model.layers.0.mlp.up_proj"


def test_a_mutated_base_that_is_none(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    with pytest.raises(BindingError, match="nothing was taken out") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=tiny_base), family="pissa")
    assert refused.value.code == "GS-434"


def test_a_mutated_base_that_differs_elsewhere(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4", target_modules=["q_proj"])
    more = make_run(tmp_path / "more", "pissa_niter_4")
    with pytest.raises(BindingError, match="where the adapter has nothing") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=more.mutated), family="pissa")
    assert refused.value.code == "GS-435"


def test_a_mutated_base_that_was_trained(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    tensors = load_file(run.mutated / "model.safetensors")
    tensors[f"{PATH}.weight"] += 1e-3 * torch.randn_like(tensors[f"{PATH}.weight"])
    save_file(tensors, run.mutated / "model.safetensors", {"format": "pt"})
    with pytest.raises(BindingError, match="less a part of the adapter's rank") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=inputs_of(run, "mutated"), family="pissa")
    assert refused.value.code == "GS-436"
    assert PATH in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_mutated_base_of_another_shape(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    other = make_run(tmp_path / "other", "pissa_niter_4", build=lambda: build_llama(intermediate_size=48))
    with pytest.raises(BindingError, match="another shape") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=other.mutated), family="pissa")
    assert refused.value.code == "GS-439"


def test_initial_adapter_and_mutated_base_of_two_runs(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_1", r=2, prepare=lambda *_: torch.manual_seed(1))
    other = make_run(tmp_path / "other", "pissa_niter_1", r=2, prepare=lambda *_: torch.manual_seed(2))
    inputs = Inputs(init_adapter=run.initial, mutated_base=other.mutated)
    with pytest.raises(BindingError, match="not what the mutated base lacks") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=inputs, family="residual")
    assert refused.value.code == "GS-432"


def test_flags_come_before_what_lies_beside_the_adapter(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    plain = make_run(tmp_path / "plain", True)
    shutil.copytree(plain.initial, run.adapter / "pissa_init")  # useless, and would be refused
    done = prove_exact_as(run, tiny_base, tmp_path, "pissa", inputs_of(run, "init"))
    assert str(run.initial) in done.reading.method
    with pytest.raises(BindingError, match="adds nothing") as refused:
        converted(run.adapter, tiny_base, tmp_path / "other", family="pissa")
    assert refused.value.code == "GS-438"


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("neighbour", [{"r": 4}, {"r": 8}, {"target_modules": ["q_proj"]}, {"init": True}])
def test_a_neighbours_initial_adapter_does_not_block(
    tmp_path: Path, tiny_base: Path, init: str, neighbour: dict[str, Any]
) -> None:
    """Beside the adapter lies another's pissa_init: nobody named it, and the base says what P0 is."""
    run = make_run(tmp_path / "runs", init)
    settings = {"init": "pissa_niter_4" if init == "pissa" else "pissa", **neighbour}
    other = make_run(tmp_path / "other", **settings, prepare=lambda *_: torch.manual_seed(9))
    shutil.copytree(other.initial, tmp_path / "runs" / "pissa_init")
    done = prove_exact_as(run, tiny_base, tmp_path, init)
    if neighbour == {"r": 4} and init == "pissa":  # its niter part is this one's too, but for rounding
        return
    assert any("pissa_init lies there, but is not this adapter's" in note for note in done.reading.notes)
    assert done.reading.files == ()


def test_of_several_beside_it_the_adapters_own_is_taken(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "runs", "pissa_niter_1", r=2, prepare=lambda *_: torch.manual_seed(1))
    other = make_run(tmp_path / "other", True, r=2)
    shutil.copytree(other.initial, run.adapter / "pissa_init")
    shutil.copytree(run.initial, tmp_path / "runs" / "pissa_init")
    done = prove_exact_as(run, tiny_base, tmp_path, "pissa")
    assert done.reading.files == (tmp_path / "runs" / "pissa_init",)


def test_a_neighbours_initial_adapter_is_refused_where_nothing_else_is_there(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "runs", "pissa_niter_1", r=2, prepare=lambda *_: torch.manual_seed(1))
    other = make_run(tmp_path / "other", "pissa", r=4)
    shutil.copytree(other.initial, tmp_path / "runs" / "pissa_init")
    with pytest.raises(BindingError, match="found by itself and is not this adapter's") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out")
    assert refused.value.code == "GS-430"
    named = converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(mutated_base=run.mutated))
    assert any("left aside" in note for note in named.reading.notes)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("way", ["computed", "init"])
def test_a_base_of_other_shapes(tmp_path: Path, init: str, way: str) -> None:
    run = make_run(tmp_path, init)
    shutil.copytree(run.initial, tmp_path / "adapter" / "pissa_init")
    build_llama(hidden_size=48, num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path / "wider")
    inputs = inputs_of(run, way)
    with pytest.raises(BindingError, match="does not fit this base") as refused:
        converted(run.adapter, tmp_path / "wider", tmp_path / "out", inputs=inputs)
    assert refused.value.code == "GS-405"
    with pytest.raises(BindingError, match="GS-405"):
        find_gap(run.adapter, Base("wider", tmp_path / "wider"), GapConfig(), inputs)


def test_modules_that_were_not_edited_have_no_initial_part(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    pair = MutatedBase(BaseWeights(tiny_base), BaseWeights(run.mutated))
    assert norm(pair.initial(PATH, 4)) > 1
    assert norm(MutatedBase(pair.base, pair.base).initial(PATH, 4)) == 0


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_the_cliff(dtype: str, close: float) -> None:
    """W0 - W_res holds P0 of rank r: found to what rounding W_res to its dtype leaves."""
    generator = torch.Generator().manual_seed(0)
    P0 = torch.randn(96, 4, generator=generator) @ torch.randn(4, 64, generator=generator) / 8
    W0 = torch.randn(96, 64, generator=generator)
    D = W0.double() - (W0 - P0).to(getattr(torch, dtype)).double()
    found, one_more = nearest(D, 4), nearest(D, 5)
    assert float((found.delta() - P0).norm()) < close * float(P0.norm())
    assert distance(one_more, found) < close * float(P0.norm())  # nothing but rounding beyond rank 4


def late(run: Run, folder: Path, init: Any, steps: int = 3, **settings: Any) -> Path:
    """An adapter of the same start as the run's initial one, a few steps later."""
    model = get_peft_model(build_llama(), LoraConfig(init_lora_weights=init, r=4, lora_alpha=8, **settings))
    set_peft_model_state_dict(model, load_file(run.initial / "adapter_model.safetensors"))
    train(model, steps=steps, lr=1e-3).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["pissa", "residual"])
def test_an_initial_adapter_of_a_later_step(tmp_path: Path, tiny_base: Path, family: str) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    inputs = Inputs(init_adapter=late(run, tmp_path / "late", "gaussian", target_modules=LINEAR))
    with pytest.raises(BindingError, match="no part of this base") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=inputs, family=family)
    assert refused.value.code == "GS-433"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_swapped_bases(tmp_path: Path, tiny_base: Path, init: str) -> None:
    run = make_run(tmp_path, init)
    with pytest.raises(BindingError, match="does not hold") as refused:
        converted(run.adapter, run.mutated, tmp_path / "out", inputs=Inputs(mutated_base=tiny_base), family="pissa")
    assert refused.value.code == "GS-442"


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("way", ["computed", "init", "mutated"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tied_head_was_edited_with_the_embeddings(tmp_path: Path, way: str, is_stored: bool) -> None:
    """is_stored: the untouched base's files hold the head too, as a copy of the embeddings."""

    def build() -> Any:
        return build_llama(tie_word_embeddings=True)

    build().save_pretrained(tmp_path / "base")
    if is_stored:
        copy_embeddings_to_head(tmp_path / "base")
    run = make_run(tmp_path, "pissa", build=build, target_modules=["lm_head", "q_proj"])
    for folder in (run.adapter, run.initial):  # as save_embedding_layers=False leaves it
        file = folder / "adapter_model.safetensors"
        save_file({name: one for name, one in load_file(file).items() if "base_layer" not in name}, file)
    with pytest.raises(InputError, match="ties to its embeddings") as refused:
        converted(run.adapter, tmp_path / "base", tmp_path / "out", inputs=inputs_of(run, way), family="pissa")
    assert refused.value.code == "GS-3125"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rounded_initial_adapter_is_made_exact_again(tmp_path: Path, init: str) -> None:
    """In bfloat16 A0 and B0 were rounded after W_res was made: P0 is had from W_res, or from W0, and not from them."""
    build_llama().bfloat16().save_pretrained(tmp_path / "base")
    run = make_run(tmp_path, init, dtype=torch.bfloat16)
    base, edited = BaseWeights(tmp_path / "base"), BaseWeights(run.mutated)
    removed = base.weight(PATH).double() - edited.weight(PATH).double()
    off = {}
    for way in ("computed", "init", "both"):
        done = converted(run.adapter, tmp_path / "base", tmp_path / way, inputs=inputs_of(run, way), family=init)
        assert done.reading.initial is not None
        off[way] = float((done.reading.initial[PATH].delta() - removed).norm())
        assert any("16 bits" in note for note in done.reading.notes)
    stored = read_stored(run.initial)
    assert off["init"] < 1.05 * off["computed"] < 0.8 * float((stored - removed).norm())
    assert off["both"] < off["computed"]


def read_stored(adapter: Path) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{PATH}.lora_{part}.weight"].double() for part in "AB")
    config = json.loads((adapter / "adapter_config.json").read_text())
    product: torch.Tensor = config["lora_alpha"] / config["r"] * B @ A
    return product


def test_an_initial_adapter_of_another_family(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    other = make_run(tmp_path / "other", True, use_dora=True)
    with pytest.raises(BindingError, match="another family") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(init_adapter=other.initial), family="pissa")
    assert refused.value.code == "GS-430"


@pytest.mark.parametrize("option", ["init_adapter", "mutated_base", "cache"])
def test_a_source_that_nobody_needs(tmp_path: Path, tiny_base: Path, option: str) -> None:
    run = make_run(tmp_path, True)
    with pytest.raises(UsageError, match="was not used") as refused:
        converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(**{option: run.initial}), family="lora")
    assert refused.value.code == "GS-233"


def test_a_sibling_that_was_read_is_never_the_output(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    shutil.copytree(run.initial, tmp_path / "pissa_init")
    seal_folder(tmp_path / "pissa_init", {})  # one of our outputs, which --overwrite would replace
    before = (tmp_path / "pissa_init" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="an input") as refused:
        convert(run.adapter, Base("base", tiny_base), tmp_path / "pissa_init", overwrite=True)
    assert refused.value.code == "GS-251"
    assert (tmp_path / "pissa_init" / "adapter_model.safetensors").read_bytes() == before


def test_an_adapter_that_changes_meanwhile(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, True)

    def touch(progress: Progress) -> None:
        if progress.stage == "convert":
            with (run.adapter / "adapter_config.json").open("a") as file:
                file.write("\n")

    with pytest.raises(MismatchError, match="changed while") as refused:
        convert(run.adapter, Base("base", tiny_base), tmp_path / "out", inputs=Inputs(listen=touch))
    assert refused.value.code == "GS-101"
    assert not (tmp_path / "out").exists()
