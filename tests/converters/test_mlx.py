"""mlx-lm, rebuilt from its forward pass: x Wᵀ + scale * (x lora_a) lora_b, with lora_a (in, r) and lora_b (r, out)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_llama import PlainLlama, random_factors
from proving import EXACT, converted, input_ids, load_on, logits_of, off_by, prove_exact
from safetensors.torch import save_file
from tiny_models import LLAMA_PATHS, build_llama, llama_shapes
from torch import Tensor

from gora_serve.errors import GoraError

RANKS = dict.fromkeys(LLAMA_PATHS[7:], 4)  # num_layers 1: the last layer alone
SCALE = 7.5


def write_mlx(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": SCALE, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": 1, "model": "some/base", "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def mlx_tensors(ranks: dict[str, int] | None = None) -> dict[str, Tensor]:
    tensors = {}
    for path, (down, up) in random_factors(llama_shapes(), ranks or RANKS).items():
        tensors |= {f"{path}.lora_a": down.T, f"{path}.lora_b": up.T}
    return tensors


def their_logits(base: Path, tensors: dict[str, Tensor], *, transposed: bool = False) -> Tensor:
    def update(path: str, x: Tensor) -> Tensor | float:
        if f"{path}.lora_a" not in tensors:
            return 0.0
        product = tensors[f"{path}.lora_a"].double() @ tensors[f"{path}.lora_b"].double()  # (in, out)
        return SCALE * (x @ (product.T if transposed else product))

    return PlainLlama(base, neighbors=False).logits(input_ids(), update).float()


def test_factors_are_transposed_and_scale_is_as_it_is(tmp_path: Path, tiny_base: Path) -> None:
    tensors = mlx_tensors()
    done = prove_exact(
        write_mlx(tmp_path / "mlx", tensors),
        tiny_base,
        tmp_path / "out",
        their_logits(tiny_base, tensors),
        family="mlx",
    )
    assert set(done.modules) == set(RANKS)


def test_square_layers(tmp_path: Path, tiny_base: Path) -> None:
    """Of rank 32 and in a square layer every orientation has the same shapes; only one is right."""
    tensors = mlx_tensors({path: 32 for path in RANKS if path.endswith(("q_proj", "o_proj"))})
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(32, 32)}
    trained = their_logits(tiny_base, tensors)
    assert off_by(their_logits(tiny_base, tensors, transposed=True), trained) > 1000 * EXACT
    prove_exact(write_mlx(tmp_path / "mlx", tensors), tiny_base, tmp_path / "out", trained, family="mlx")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # PEFT on any adapter of tied layers
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tmp_path: Path, tied: bool) -> None:
    """LoRAEmbedding: W + scale * lora_a lora_b, (V, d); as_linear uses it for the head where that is tied."""
    base = tmp_path / "base"
    build_llama(tie_word_embeddings=tied).save_pretrained(base)
    generator = torch.Generator().manual_seed(2)
    tensors = mlx_tensors() | {
        "model.embed_tokens.lora_a": torch.randn(384, 4, generator=generator) * 0.02,
        "model.embed_tokens.lora_b": torch.randn(4, 32, generator=generator) * 0.1,
    }
    adapted = PlainLlama(base, neighbors=False)
    table = SCALE * tensors["model.embed_tokens.lora_a"].double() @ tensors["model.embed_tokens.lora_b"].double()
    adapted.weights["model.embed_tokens.weight"] = adapted.weights["model.embed_tokens.weight"] + table

    def update(path: str, x: Tensor) -> Tensor | float:
        if f"{path}.lora_a" not in tensors:
            return 0.0
        return SCALE * (x @ tensors[f"{path}.lora_a"].double() @ tensors[f"{path}.lora_b"].double())

    trained = adapted.logits(input_ids(), update).float()
    done = prove_exact(write_mlx(tmp_path / "mlx", tensors), base, tmp_path / "out", trained, family="mlx")
    assert set(done.modules) == {*RANKS, "model.embed_tokens", *(["lm_head"] if tied else [])}


def test_a_scale_of_the_years_before(tmp_path: Path, tiny_base: Path) -> None:
    """alpha beside scale meant scale * alpha / rank once: refused where that is another number."""
    tensors = mlx_tensors()
    old = {"rank": 4, "alpha": 16, "scale": SCALE, "dropout": 0.0}
    with pytest.raises(GoraError, match="GS-3181"):
        converted(write_mlx(tmp_path / "old", tensors, lora_parameters=old), tiny_base, tmp_path / "out", family="mlx")
    both = write_mlx(tmp_path / "both", tensors, lora_parameters=old | {"alpha": 4})
    prove_exact(both, tiny_base, tmp_path / "out", their_logits(tiny_base, tensors), family="mlx")


@pytest.mark.parametrize(
    ("config", "more", "code"),
    [
        ({"fine_tune_type": "full", "lora_parameters": None}, {}, "GS-3178"),
        ({"fine_tune_type": "dora"}, {"model.layers.1.mlp.up_proj.m": torch.ones(64)}, "GS-3172"),
        ({"lora_parameters": {"rank": 4}}, {}, "GS-3180"),
        ({}, {"model.layers.0.mlp.switch.lora_a": torch.ones(2, 4, 32), "model.layers.0.mlp.switch.lora_b":
              torch.ones(2, 64, 4)}, "GS-3179"),
        ({}, {"model.layers.1.mlp.up_proj.weight": torch.ones(64, 32)}, "GS-3104"),
        ({}, {"model.layers.0.mlp.up_proj.lora_a": torch.ones(32, 4)}, "GS-3171"),
        ({}, {"model.layers.9.mlp.up_proj.lora_a": torch.ones(32, 4), "model.layers.9.mlp.up_proj.lora_b":
              torch.ones(4, 64)}, "GS-404"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, tiny_base: Path, config: Any, more: dict[str, Tensor], code: str) -> None:
    adapter = write_mlx(tmp_path / "mlx", mlx_tensors() | more, **config)
    with pytest.raises(GoraError) as caught:
        converted(adapter, tiny_base, tmp_path / "out", family="mlx")
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_only_the_scale_counts(tmp_path: Path, tiny_base: Path) -> None:
    """A reader that took scale for alpha / r would be off by the rank."""
    tensors = mlx_tensors()
    parameters = {"rank": 4, "scale": SCALE / 4, "dropout": 0.0}
    converted(
        write_mlx(tmp_path / "mlx", tensors, lora_parameters=parameters), tiny_base, tmp_path / "out", family="mlx"
    )
    assert off_by(logits_of(load_on(tiny_base, tmp_path / "out")), their_logits(tiny_base, tensors)) > 1000 * EXACT
