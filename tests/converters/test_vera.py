"""VeRA: projections that were saved, and projections that are drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from proving import converted, load_on, logits_of, off_by, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import build_gpt2, build_llama

from converters.reading import Inputs
from converters.source import open_source
from converters.vera import read
from gora_serve.deploy.base import BaseWeights
from gora_serve.errors import InputError, UsageError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Specified to not load vera_A", "ignore:Specified to not save vera_A", "ignore:fan_in_fan_out"
)


def trained_vera(folder: Path, model: Any, **settings: Any) -> Any:
    config = VeraConfig(**{"r": 12, "target_modules": "all-linear", "d_initial": 0.5, **settings})
    trained = train(get_peft_model(model, config), steps=12, lr=5e-2)
    trained.save_pretrained(folder)
    return trained


@pytest.mark.parametrize("saved", [True, False])
def test_vera_is_exact(tmp_path: Path, tiny_base: Path, saved: bool) -> None:
    """Modules of several shapes share A and B: the largest in and the largest out come from different modules."""
    model = trained_vera(tmp_path / "adapter", build_llama(), save_projection=saved, projection_prng_key=5)
    done = prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), family="vera")
    assert ("as saved" in done.reading.method) == saved
    assert max(module.full_rank for module in done.modules.values()) == 12


@pytest.mark.parametrize("saved", [True, False])
def test_vera_on_conv1d(tmp_path: Path, tiny_gpt2: Path, saved: bool) -> None:
    targets = ["c_attn", "c_fc", "mlp.c_proj"]
    model = trained_vera(tmp_path / "adapter", build_gpt2(), target_modules=targets, save_projection=saved)
    prove_exact(tmp_path / "adapter", tiny_gpt2, tmp_path / "out", logits_of(model), family="vera")


def test_projections_have_the_type_of_the_base(tmp_path: Path) -> None:
    """PEFT rounds what it drew to the base's type; unrounded ones would be off by 2⁻⁹ of themselves."""
    build_llama().bfloat16().save_pretrained(tmp_path / "base")
    model = trained_vera(tmp_path / "adapter", build_llama().bfloat16(), save_projection=False)
    source = open_source(tmp_path / "adapter")
    modules = read(source, Inputs(base=BaseWeights(tmp_path / "base"))).adapter.modules
    layer = load_on(tmp_path / "base", tmp_path / "adapter").base_model.model.model.layers[0].mlp.down_proj
    expected = layer.get_delta_weight("default").detach().double()
    delta = modules["model.layers.0.mlp.down_proj"].delta()
    assert float((delta - expected).norm() / expected.norm()) < 1e-6
    trained = model.base_model.model.model.layers[0].mlp.down_proj
    assert torch.equal(layer.vera_lambda_b["default"], trained.vera_lambda_b["default"])


def test_another_key_is_another_model(tmp_path: Path, tiny_base: Path) -> None:
    model = trained_vera(tmp_path / "adapter", build_llama(), save_projection=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"projection_prng_key": 0', '"projection_prng_key": 1'))
    converted(tmp_path / "adapter", tiny_base, tmp_path / "out", family="vera")
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), logits_of(model)) > 0.01


def test_refusals(tmp_path: Path, tiny_base: Path) -> None:
    trained_vera(tmp_path / "adapter", build_llama())
    with pytest.raises(UsageError, match="GS-230"):
        read(open_source(tmp_path / "adapter"), Inputs())
    inputs = Inputs(base=BaseWeights(tiny_base))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.vera_A": tensors["base_model.vera_A"][:, :40].contiguous()}, file)
    with pytest.raises(InputError, match="GS-3152"):
        read(open_source(tmp_path / "adapter"), inputs)
    first = next(name for name in tensors if name.endswith("vera_lambda_d"))
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    with pytest.raises(InputError, match="GS-3150"):
        read(open_source(tmp_path / "adapter"), inputs)
    save_file({name: tensor for name, tensor in tensors.items() if "vera_A" not in name and "vera_B" not in name}, file)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"projection_prng_key": 0', '"projection_prng_key": null'))
    with pytest.raises(InputError, match="GS-3153"):
        read(open_source(tmp_path / "adapter"), inputs)
