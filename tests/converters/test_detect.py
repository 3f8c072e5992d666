"""Detection: the family of real adapters of every kind, and what lies behind a configuration that says plain LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from inits import LINEAR, Run, edit_config, gradient_of, make_run
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from proving import converted, load_on, logits_of, off_by, train
from safetensors.torch import load_file, save_file
from test_corda import make_corda
from tiny_models import MakeAdapter, build_gpt2, build_llama

from converters import detect_files, lora
from converters.detect import Detection, decide, detect
from converters.detect_files import by_tensors
from converters.detect_weights import NEAR, PARALLEL, differs, halves, orthogonality, projections, spread
from converters.families import FAMILIES
from converters.reading import Inputs
from converters.source import open_source
from gora_serve.adapter.factors import LoraFactors
from gora_serve.adapter.format import write_adapter
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import GoraError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")  # of preprocess_loraga

NAMES = {
    "lora", "adalora", "dora", "pissa", "olora", "corda", "loftq", "lora_ga", "residual", "kasa", "vera", "loha",
    "lokr", "miss", "hra", "gora", "mlx", "torchtune", "kohya", "full",
}  # fmt: skip


def found(adapter: Path, base: Path, **inputs: Any) -> Detection:
    return detect(open_source(adapter), Inputs(base=BaseWeights(base), **inputs))


def refusal(adapter: Path, base: Path, family: str = "auto", **inputs: Any) -> GoraError:
    with pytest.raises(GoraError) as refused:
        decide(open_source(adapter), Inputs(base=BaseWeights(base), **inputs), family)
    return refused.value


def saved(folder: Path, config: Any, build: Callable[[], Any] = build_llama) -> Path:
    """A fresh adapter of PEFT, as it is saved."""
    get_peft_model(build(), config).save_pretrained(folder)
    return folder


def prepare_lora_ga(model: Any, config: LoraConfig) -> None:
    preprocess_loraga(model, config, gradient_of(model))
    torch.manual_seed(0)


def run_of(init: str, folder: Path) -> Run:
    if init == "lora_ga":
        return make_run(folder, init, prepare=prepare_lora_ga, lora_ga_config=LoraGAConfig())
    return make_run(folder, init)


def by_peft(run: Run, init: str, folder: Path) -> Path:
    """The same run again, saved as PEFT converts it: factors of twice the rank."""
    shutil.copytree(run.initial, folder / "start")
    edit_config(folder / "start", init_lora_weights=True)
    model = build_llama()
    settings = {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=init, **settings)
    if init == "lora_ga":
        prepare_lora_ga(model, config)
    trained = train(get_peft_model(model, config))
    trained.save_pretrained(folder / "subtracted", path_initial_model_for_weight_conversion=str(folder / "start"))
    return folder / "subtracted"


def test_every_family_that_is_detected_is_one_of_the_fixed_names() -> None:
    assert {*detect_files._MARKS, *detect_files._INITS.values(), "residual", "full"} == NAMES
    assert set(FAMILIES) <= NAMES


# By files


@pytest.mark.parametrize(
    ("init", "family"),
    [
        (True, "lora"), (False, "lora"), ("gaussian", "lora"), ("orthogonal", "lora"), ("mica", "lora"),
        ("pissa", "pissa"), ("pissa_niter_4", "pissa"), ("olora", "olora"),
    ],
)  # fmt: skip
def test_inits_of_peft(tmp_path: Path, tiny_base: Path, init: Any, family: str) -> None:
    run = make_run(tmp_path, init)
    detection = found(run.adapter, tiny_base)
    assert (detection.family, detection.confidence) == (family, "certain")
    assert any(f"init_lora_weights {str(init).lower()}" in line for line in detection.evidence)
    assert bool(detection.needs) == (init == "pissa_niter_4")
    assert not found(run.adapter, tiny_base, mutated_base=run.mutated).needs


@pytest.mark.parametrize(
    ("word", "family"),
    [("eva", "lora"), ("corda", "corda"), ("loftq", "loftq"), ("lora_ga", "lora_ga"), ("OLoRA", "olora")],
)
def test_words_alone(tmp_path: Path, tiny_base: Path, word: str, family: str) -> None:
    edit_config(saved(tmp_path / "a", LoraConfig(target_modules=LINEAR)), init_lora_weights=word)
    assert found(tmp_path / "a", tiny_base).family == family


def test_lora_ga_of_peft_and_of_the_fork(tmp_path: Path, tiny_base: Path) -> None:
    run = run_of("lora_ga", tmp_path)
    assert found(run.adapter, tiny_base).needs == ("--init-adapter DIR or --mutated-base DIR",)
    edit_config(run.adapter, peft_type="LORAGA", init_lora_weights=True)
    assert found(run.adapter, tiny_base).family == "lora_ga"


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (lambda: LoraConfig(target_modules=LINEAR, use_dora=True), "dora"),
        (lambda: LoraConfig(target_modules=LINEAR, kasa_config=peft.tuners.lora.config.KasaConfig()), "kasa"),
        (lambda: LoraConfig(target_modules=["embed_tokens"]), "lora"),
        (lambda: peft.AdaLoraConfig(target_modules=LINEAR, total_step=10), "adalora"),
        (lambda: peft.LoHaConfig(target_modules=LINEAR), "loha"),
        (lambda: peft.LoKrConfig(target_modules=LINEAR), "lokr"),
        (lambda: peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=4), "vera"),
        (lambda: peft.MissConfig(target_modules=LINEAR, r=4), "miss"),
        (lambda: peft.HRAConfig(target_modules=LINEAR, r=4), "hra"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kinds_of_peft(tmp_path: Path, tiny_base: Path, config: Callable[[], Any], family: str) -> None:
    detection = found(saved(tmp_path / "a", config()), tiny_base)
    assert (detection.family, detection.confidence) == (family, "certain")
    assert any("peft_type" in line for line in detection.evidence)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"], "mlx"),
        (["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"], "torchtune"),
        (["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.magnitude"], "torchtune"),
        (["lora_unet_down_attn.lora_down.weight", "lora_unet_down_attn.alpha"], "kohya"),
        (["lycoris_blocks_0.hada_w1_a"], "kohya"),
        (["model.layers.0.self_attn.q_proj.weight_a", "model.layers.0.self_attn.q_proj.weight_b"], "gora"),
        (["base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight"], "lora"),
        (["base_model.model.a.lora_A.weight", "base_model.model.a.lora_magnitude_vector"], "dora"),
        (["base_model.model.a.bone_block"], "miss"),
        (["model.layers.0.self_attn.q_proj.weight", "model.lora_Anna.weight"], None),
    ],
)
def test_names_of_tensors(names: list[str], family: str | None) -> None:
    one = by_tensors(names)
    assert (one.family if one else None) == family


def test_a_whole_model(tiny_base: Path) -> None:
    assert found(tiny_base, tiny_base).family == "full"


def config_of(folder: Path, **changes: Any) -> Path:
    edit_config(saved(folder, LoraConfig(target_modules=["q_proj"])), **changes)
    return folder


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"peft_type": "LOHA"}, "GS-3203", "peft_type LOHA"),
        ({"peft_type": "NEWEST"}, "GS-3203", "peft_type NEWEST"),
        ({"use_dora": True}, "GS-3203", "use_dora set"),
        ({"kasa_config": {"beta": 1}}, "GS-3203", "kasa_config set"),
        ({"init_lora_weights": "newest"}, "GS-3204", "newest"),
        ({"init_lora_weights": "pissa_niter_"}, "GS-3204", "pissa_niter_"),
        ({"use_qalora": True}, "GS-3205", "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "GS-3205", "use_bdlora"),
        ({"alora_invocation_tokens": [1, 2]}, "GS-3205", "alora"),
        ({"peft_type": "OFT"}, "GS-3156", "OFT"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, tiny_base: Path, changes: dict[str, Any], code: str, says: str
) -> None:
    error = refusal(config_of(tmp_path / "a", **changes), tiny_base)
    assert error.code == code
    assert says in str(error)
    assert "adapter_config.json" in str(error)


def test_two_families_at_once(tmp_path: Path, tiny_base: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights="pissa")
    error = refusal(saved(tmp_path / "a", config), tiny_base)
    assert (error.code, "--from full" in str(error)) == ("GS-3206", True)


def test_nothing_fits(tmp_path: Path, tiny_base: Path) -> None:
    save_file({"a.b": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    error = refusal(tmp_path, tiny_base)
    assert (error.code, error.fields["tensor"]) == ("GS-3200", "a.b")


def test_no_such_family(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(GoraError, match="no family lorra") as refused:
        converted(config_of(tmp_path / "a"), tiny_base, tmp_path / "out", family="lorra")
    assert refused.value.code == "GS-234"


# Behind `true`: what lies beside


def test_the_official_layout_of_pissa_converts_by_itself(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path, "pissa_niter_4")
    shutil.copytree(run.initial, run.mutated / "pissa_init")
    for adapter in (run.adapter, run.mutated / "pissa_init"):
        edit_config(adapter, init_lora_weights=True, base_model_name_or_path=str(run.mutated))
    done = converted(run.adapter, tiny_base, tmp_path / "out")
    assert done.detection.family == "residual"
    assert "pissa_init is its initial adapter" in " ".join(done.detection.evidence)
    assert "differs from --base in the adapter's modules alone" in " ".join(done.detection.evidence)
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), run.trained) < 1e-5


@pytest.mark.parametrize("given", ["init_adapter", "mutated_base"])
def test_what_is_given_says_that_the_base_was_edited(tmp_path: Path, tiny_base: Path, given: str) -> None:
    run = run_of("lora_ga", tmp_path)
    edit_config(run.adapter, init_lora_weights=True)
    path = run.initial if given == "init_adapter" else run.mutated
    done = converted(run.adapter, tiny_base, tmp_path / "out", inputs=Inputs(**{given: path}))
    assert done.detection.family == "residual"
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), run.trained) < 1e-5


def test_an_initial_adapter_of_another_run_beside_it_is_told_and_not_used(tmp_path: Path, tiny_base: Path) -> None:
    other = make_run(tmp_path / "other", "pissa")
    run = make_run(tmp_path / "run", True)
    shutil.copytree(other.initial, run.adapter.parent / "pissa_init")
    detection = found(run.adapter, tiny_base)
    assert (detection.family, detection.confidence) == ("lora", "certain")
    assert "is no initial adapter of this one" in " ".join(detection.evidence)


def test_another_base_in_the_configuration_is_told(tmp_path: Path, tiny_base: Path) -> None:
    build_llama(1).save_pretrained(tmp_path / "other")
    run = make_run(tmp_path, True)
    edit_config(run.adapter, base_model_name_or_path=str(tmp_path / "other"))
    detection = found(run.adapter, tiny_base)
    assert detection.family == "lora"
    assert "whose weights are not those of --base" in detection.evidence[-2]


def test_where_two_bases_differ(tmp_path: Path, tiny_base: Path) -> None:
    base, targets = BaseWeights(tiny_base), ["model.layers.1.self_attn.q_proj"]
    assert differs(base, tiny_base, targets) == "nowhere"
    assert differs(base, tmp_path, targets) == "unreadable"
    model = build_llama()
    model.get_submodule(targets[0]).weight.data += 1e-3
    model.save_pretrained(tmp_path / "targets")
    assert differs(base, tmp_path / "targets", targets) == "targets"
    build_llama().bfloat16().save_pretrained(tmp_path / "rounded")
    assert differs(base, tmp_path / "rounded", targets) == "nowhere"
    build_llama(2).save_pretrained(tmp_path / "other")
    assert differs(base, tmp_path / "other", targets) == "everywhere"


def test_our_own_export(tmp_path: Path, tiny_base: Path, tiny_adapter: Any) -> None:
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", tiny_adapter, "unit")
    assert "written by gora-serve" in found(tmp_path / "a", tiny_base).evidence[-1]


# Behind `true`: converted already


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_peft_converted(tmp_path: Path, tiny_base: Path, init: str) -> None:
    run = run_of(init, tmp_path)
    adapter = by_peft(run, init, tmp_path)
    done = converted(adapter, tiny_base, tmp_path / "out")
    assert done.detection.family == "lora"
    assert "already converted" in " ".join(done.detection.evidence)
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), run.trained) < 1e-5
    for family, inputs in {"residual": {"init_adapter": run.initial}, "auto": {"mutated_base": run.mutated}}.items():
        assert refusal(adapter, tiny_base, family, **inputs).code == "GS-3201"
    edit_config(adapter, init_lora_weights=init)
    error = refusal(adapter, tiny_base)
    assert (error.code, "--from lora" in str(error)) == ("GS-3201", True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_plain_adapters_have_no_such_halves(make_adapter: MakeAdapter, seed: int, rank: int) -> None:
    modules = make_adapter({f"m.{index}": rank for index in range(12)}, seed=seed).modules
    half = halves(modules)
    assert half is not None
    assert not half.parallel
    doubled = {
        path: LoraFactors(torch.cat([one.A, one.A + 0.02]), torch.cat([one.B, -one.B], 1), 1.0)
        for path, one in modules.items()
    }
    twice = halves(doubled)
    assert twice is not None
    assert twice.parallel
    same = {path: LoraFactors(one.A, torch.cat([one.B.chunk(2, 1)[0]] * 2, 1), 1.0) for path, one in doubled.items()}
    other = halves(same)  # [B, B] [A; A0] is a sum, no difference
    assert other is not None
    assert not other.parallel


def test_odd_ranks_have_no_halves(make_adapter: MakeAdapter) -> None:
    assert halves(make_adapter({"a": 3, "b": 5}).modules) is None


# Behind `true`: a part of the base in the weights


def long_run(init: Any, base: Path, folder: Path) -> Path:
    """Until the loss has fallen to a fifth: the hardest case for the weights' evidence."""
    model = get_peft_model(build_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=init))
    train(model, steps=40).save_pretrained(folder)
    edit_config(folder, init_lora_weights=True)
    return folder


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_edited_base_shows_in_the_weights(tmp_path: Path, tiny_base: Path, init: str) -> None:
    adapter = long_run(init, tiny_base, tmp_path / "a")
    detection = found(adapter, tiny_base)
    assert (detection.family, detection.confidence) == (init.partition("_")[0], "likely")
    error = refusal(adapter, tiny_base)
    assert error.code == "GS-3202"
    assert "cosine" in str(error)
    assert "--from lora" in str(error)
    assert ("--from olora" in str(error)) == (init == "olora")
    assert decide(open_source(adapter), Inputs(base=BaseWeights(tiny_base)), "lora").family == "lora"


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
def test_plain_adapters_hold_no_part_of_the_base(tmp_path: Path, tiny_base: Path, init: Any) -> None:
    adapter = long_run(init, tiny_base, tmp_path / "a")
    detection = found(adapter, tiny_base)
    assert (detection.family, detection.confidence) == ("lora", "certain")
    assert "no part of the base" in detection.evidence[-1]
    source = open_source(adapter)
    modules = lora.read(source, Inputs()).adapter.modules
    numbers, half = projections(modules, BaseWeights(tiny_base)), halves(modules)
    assert numbers is not None
    assert half is not None
    assert max(abs(numbers.on_rows), abs(numbers.on_columns)) < NEAR / 2
    assert abs(half.rows) < PARALLEL


def test_a_minor_part_is_told_from_a_principal_one(tmp_path: Path, tiny_base: Path) -> None:
    base, modules = BaseWeights(tiny_base), {}
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        U, S, Vh = torch.linalg.svd(base.weight(path), full_matrices=False)
        modules[path] = LoraFactors(S[-4:, None] * Vh[-4:], U[:, -4:], 1.0)
    numbers = projections(modules, base)
    assert numbers is not None
    assert (numbers.family, numbers.energy < 1) == ("residual", True)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_shows_as_some_part_of_the_base(tmp_path: Path, tiny_base: Path, method: str) -> None:
    run, _ = make_corda(tmp_path, method)
    edit_config(run.adapter, init_lora_weights=True)
    detection = found(run.adapter, tiny_base)
    assert (detection.family, detection.confidence) == ("residual", "likely")


def test_pissa_of_conv1d_shows_too(tmp_path: Path, tiny_gpt2: Path) -> None:
    run = make_run(tmp_path, "pissa", build=build_gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    edit_config(run.adapter, init_lora_weights=True)
    assert found(run.adapter, tiny_gpt2).family == "pissa"


def test_lora_ga_is_guessed_and_goes_on_as_plain(tmp_path: Path, tiny_base: Path) -> None:
    run = run_of("lora_ga", tmp_path)
    edit_config(run.adapter, init_lora_weights=True)
    done = converted(run.adapter, tiny_base, tmp_path / "out")
    assert (done.detection.family, done.detection.confidence) == ("lora", "guess")
    assert "LoRA-GA" in done.detection.needs[0]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["confidence"] == "guess"
    plain = lora.read(open_source(make_run(tmp_path / "plain", True).adapter), Inputs()).adapter.modules
    rows = orthogonality(plain)
    assert rows is not None
    assert rows > 0.7


def test_a_swapped_base_of_a_base_editing_family(tmp_path: Path, tiny_base: Path) -> None:
    build_llama(1).save_pretrained(tmp_path / "other")
    for init in ("pissa", "olora"):
        run = make_run(tmp_path / init, init)
        error = refusal(run.adapter, tmp_path / "other")
        assert error.code == refusal(run.adapter, tmp_path / "other", init).code == "GS-440"
        assert decide(open_source(run.adapter), Inputs(base=BaseWeights(tiny_base))).family == init


def test_the_sample_is_spread() -> None:
    assert spread([str(number) for number in range(20)], 4) == ["0", "5", "10", "15"]
    assert spread(["a", "b"], 4) == ["a", "b"]
    assert spread([], 4) == []


def test_names_in_a_real_file(tmp_path: Path, tiny_base: Path) -> None:
    """A file of another tool, whole: kohya's, over the tiny base."""
    run = make_run(tmp_path, True)
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    renamed = {
        "lora_te_" + name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0].replace(".", "_")
        + (".lora_down.weight" if "lora_A" in name else ".lora_up.weight"): tensor * (1 if "lora_A" in name else 2)
        for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(renamed, tmp_path / "kohya.safetensors")
    done = converted(tmp_path / "kohya.safetensors", tiny_base, tmp_path / "out")
    assert done.detection.family == "kohya"
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), run.trained) < 1e-5
