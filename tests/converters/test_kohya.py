"""kohya's sd-scripts, rebuilt from its forward pass: alpha / r * lora_up(lora_down(x)), under underscored names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_llama import PlainLlama, random_factors
from proving import EXACT, converted, input_ids, off_by, prove_exact
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_PATHS, llama_shapes
from torch import Tensor

from gora_serve.errors import GoraError

RANKS = {path: (1, 3, 8)[index % 3] for index, path in enumerate(LLAMA_PATHS)}
ALPHAS = {path: (4.0, None, 0.0)[index // 2 % 3] for index, path in enumerate(LLAMA_PATHS)}
Factors = dict[str, tuple[Tensor, Tensor]]


def write_kohya(file: Path, factors: Factors, more: dict[str, Tensor] | None = None, prefix: str = "lora_te_") -> Path:
    tensors = dict(more or {})
    for path, (down, up) in factors.items():
        name = prefix + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if ALPHAS[path] is not None:
            tensors[f"{name}.alpha"] = torch.tensor(ALPHAS[path])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def their_logits(base: Path, factors: Factors, *, scaled: bool = True) -> Tensor:
    def update(path: str, x: Tensor) -> Tensor | float:
        if path not in factors:
            return 0.0
        down, up = (one.double() for one in factors[path])
        scale = (ALPHAS[path] or down.shape[0]) / down.shape[0] if scaled else 1.0
        return scale * (x @ down.T @ up.T)

    return PlainLlama(base, neighbors=False).logits(input_ids(), update).float()


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_unet_", "lycoris_", "lora_te_cut"])
def test_names_and_alphas(tmp_path: Path, tiny_base: Path, prefix: str) -> None:
    """alpha per module; none, and 0, stand for the rank. Names may lack the model's first part."""
    factors = random_factors(llama_shapes(), RANKS)
    file = write_kohya(tmp_path / "lora.safetensors", factors, prefix=prefix.removesuffix("cut"))
    if prefix.endswith("cut"):
        save_file({name.replace("te_model_", "te_"): tensor for name, tensor in load_file(file).items()}, file)
    trained = their_logits(tiny_base, factors)
    assert off_by(their_logits(tiny_base, factors, scaled=False), trained) > 1000 * EXACT
    done = prove_exact(file, tiny_base, tmp_path / "out", trained, family="kohya")
    assert set(done.modules) == set(RANKS)


def test_an_underscore_that_may_be_a_dot(tmp_path: Path) -> None:
    """Two modules of the base spell the same: nothing says which it is."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {"a.b_c.weight": torch.ones(4, 4), "a.b.c.weight": torch.ones(4, 4), "a.d_e.weight": torch.ones(4, 4)},
        base / "model.safetensors",
    )
    (base / "tokenizer.json").write_text("{}")
    for name, right in (("a_b_c", False), ("a_d_e", True)):
        halves = {
            f"lora_te_{name}.lora_down.weight": torch.ones(1, 4),
            f"lora_te_{name}.lora_up.weight": torch.ones(4, 1),
        }
        save_file(halves, tmp_path / "lora.safetensors")
        if right:
            assert set(converted(tmp_path / "lora.safetensors", base, tmp_path / "out", family="kohya").modules) == {
                "a.d_e"
            }
        else:
            with pytest.raises(GoraError, match=r"GS-461[^$]*a\.b\.c and a\.b_c"):
                converted(tmp_path / "lora.safetensors", base, tmp_path / "out", family="kohya")


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"lora_te_model_layers_0_mlp_up_proj.dora_scale": torch.ones(64, 1)}, "GS-3172"),
        ({"lora_unet_conv.lora_down.weight": torch.ones(2, 4, 3, 3), "lora_unet_conv.lora_up.weight":
          torch.ones(4, 2, 1, 1)}, "GS-3183"),
        ({"lora_te_model_layers_9_mlp_up_proj.lora_down.weight": torch.ones(1, 32)}, "GS-461"),
        ({"lora_te_model_layers_0_mlp_up_proj.alpha": torch.ones(2)}, "GS-3184"),
        ({"lora_te_model_layers_0_mlp_up_proj.alpha": torch.tensor(float("nan"))}, "GS-3184"),
        ({"lora_te_model_layers_0_mlp_up_proj.hada_w1_a": torch.ones(64, 2)}, "GS-3104"),
        ({"lora_te_model_layers_1_mlp_nothing.alpha": torch.tensor(1.0)}, "GS-3104"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, tiny_base: Path, more: dict[str, Tensor], code: str) -> None:
    file = write_kohya(tmp_path / "lora.safetensors", random_factors(llama_shapes(), RANKS))
    save_file(load_file(file) | more, file)
    with pytest.raises(GoraError) as caught:
        converted(file, tiny_base, tmp_path / "out", family="kohya")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
