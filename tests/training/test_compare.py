"""The models that `gap --data` compares: their logits and outcomes against PEFT's own models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_base import Edited, called_plain, train_pissa
from tiny_models import LLAMA_PATHS, MakeAdapter, build_llama, color_rows, write_jsonl
from torch import Tensor

from gora_serve.adapter.factors import LoraFactors
from gora_serve.config import DataConfig
from gora_serve.deploy.base import BaseWeights
from gora_serve.deploy.gap import Parts
from gora_serve.errors import InputError
from gora_serve.integrity.bases import Base
from gora_serve.progress import Progress
from gora_serve.training import compare as compare_file
from gora_serve.training.compare import AS_TRAINED, BASE, CONVERTED, UNCONVERTED, Swap, Variant, compare, variants_of
from gora_serve.training.data import collate, load_data
from gora_serve.training.models import load_tokenizer
from gora_serve.training.quantize import nf4_rounder

IDS = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(1))
ROWS = DataConfig(max_length=96, batch_size=4)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Edited:
    return train_pissa(tmp_path_factory.mktemp("pissa"), tiny_base)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found.float()


def loaded(base: Path, adapter: Path | None = None) -> Any:
    """The base on which PEFT has loaded an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def swapped(base: Path, parts: Parts, saved: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The logits of each variant, twice around: nothing of one may be left in the next."""
    variants = variants_of(parts, saved or {}, torch.float32, 1e-7)
    swap = Swap(loaded(base), parts.paths, variants)
    for name in [*variants, *variants]:
        yield name, logits(swap.to(variants[name]))


def near(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).abs().max()) < tolerance * max(1.0, float(other.abs().max()))


def test_the_models_are_those_of_peft(edited: Edited, tiny_base: Path) -> None:
    wrong = logits(loaded(tiny_base, called_plain(edited.adapter)))
    expected = {
        AS_TRAINED: logits(edited.model), UNCONVERTED: wrong, CONVERTED: logits(edited.model),
        BASE: logits(loaded(tiny_base)),
    }  # fmt: skip
    seen = []
    for name, found in swapped(tiny_base, edited.parts(tiny_base)):
        assert near(found, expected[name]), name
        seen.append(name)
    assert seen == [AS_TRAINED, UNCONVERTED, CONVERTED, BASE] * 2
    assert not near(wrong, expected[AS_TRAINED], 1e-2)
    assert not near(expected[BASE], expected[AS_TRAINED], 1e-2)


def test_a_base_in_bfloat16_was_trained_with_its_rounding(tmp_path: Path) -> None:
    """W_res of the files gives what was trained; the converted adapter lacks its rounding, and no more."""
    build_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    edited = train_pissa(tmp_path, tmp_path / "base")
    precise = edited.model.float()
    parts = edited.parts(tmp_path / "base", mutated=BaseWeights(edited.mutated))
    variants = variants_of(parts, {}, torch.float32, 1e-7)
    swap = Swap(loaded(tmp_path / "base").float(), parts.paths, variants)
    trained, converted = (logits(swap.to(variants[name])) for name in (AS_TRAINED, CONVERTED))
    assert near(trained, logits(precise))
    off = float((converted - trained).abs().max())
    assert 1e-4 < off < 0.2 * float((logits(swap.to(variants[UNCONVERTED])) - trained).abs().max())


def test_conv1d(tmp_path: Path, tiny_gpt2: Path) -> None:
    edited = train_pissa(tmp_path, tiny_gpt2, targets=["c_attn", "c_fc"], fan_in_fan_out=True)
    found = dict(swapped(tiny_gpt2, edited.parts(tiny_gpt2)))
    assert near(found[AS_TRAINED], logits(edited.model))
    assert near(found[CONVERTED], logits(edited.model))
    assert near(found[UNCONVERTED], logits(loaded(tiny_gpt2, called_plain(edited.adapter))))


def test_an_update_on_a_tied_head_leaves_the_embeddings_alone(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    from peft import LoraConfig, get_peft_model

    build_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    factors = make_adapter({"lm_head": 2}, shapes={"lm_head": (384, 32)}, scales=1.0).modules["lm_head"]
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(loaded(tmp_path), LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]))
    layer = model.base_model.model.lm_head
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = factors.A, factors.B
    found = dict(swapped(tmp_path, Parts(BaseWeights(tmp_path), {"lm_head": factors}, {"lm_head": factors})))
    assert near(found[CONVERTED], logits(model.eval()))
    assert near(found[BASE], logits(loaded(tmp_path)))
    assert not near(found[BASE], found[CONVERTED], 1e-2)


def test_modules_that_an_adapter_saves_whole(tmp_path: Path, tiny_base: Path) -> None:
    """All models but the base have them, also where the same module has an update."""
    head = torch.randn(384, 32, generator=torch.Generator().manual_seed(5))
    changed = build_llama()
    changed.lm_head.weight.data = head
    parts = Parts(BaseWeights(tiny_base), {}, {})
    found = dict(swapped(tiny_base, parts, {"lm_head.weight": head}))
    for name in (AS_TRAINED, UNCONVERTED, CONVERTED):
        assert near(found[name], logits(changed))
    assert near(found[BASE], logits(build_llama()))


def own_outcome(trained: Any, other: Any, base: Path, data: Path, rows: int) -> tuple[float, float, float]:
    """Loss, KL and agreement over tokens with loss, row by row, in float64, from the two models' logits."""
    tokenizer = load_tokenizer(Base(str(base), base))
    sums = torch.zeros(4, dtype=torch.float64)
    for example in load_data(str(data), tokenizer, ROWS).examples[:rows]:
        batch = collate([example], tokenizer.pad_token_id)
        one, two = (torch.log_softmax(logits(m, batch["input_ids"])[0, :-1].double(), -1) for m in (trained, other))
        for place, label in enumerate(batch["labels"][0, 1:].tolist()):
            if label != -100:
                kl = sum(float(p.exp() * (p - q)) for p, q in zip(one[place], two[place], strict=True))
                same = int(one[place].argmax() == two[place].argmax())
                sums += torch.tensor([-float(two[place, label]), kl, same, 1], dtype=torch.float64)
    loss, kl, same = (sums[:3] / sums[3]).tolist()
    return loss, kl, same


def test_outcomes_are_those_of_the_models(
    edited: Edited, tiny_base: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base(str(tiny_base), tiny_base)
    parts = edited.parts(tiny_base)
    variants = variants_of(parts, {}, torch.bfloat16, 5e-4)
    told: list[Progress] = []
    found = compare(base, str(tiny_data), parts, variants, rows=ROWS, max_rows=6, listen=told.append)
    assert list(found.outcomes) == [AS_TRAINED, UNCONVERTED, CONVERTED, BASE]
    assert found.rows == 6
    assert (told[-1].done, told[-1].stage) == (told[-1].total, "compare")
    served = loaded(tiny_base, called_plain(edited.adapter))
    for name, model in ((AS_TRAINED, edited.model), (UNCONVERTED, served), (BASE, loaded(tiny_base))):
        loss, kl, same = own_outcome(edited.model, model, tiny_base, tiny_data, 6)
        outcome = found.outcomes[name]
        assert outcome.loss == pytest.approx(loss, rel=1e-5)
        assert outcome.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)
        assert outcome.agreement == pytest.approx(same)
    assert found.outcomes[AS_TRAINED].kl == 0
    assert found.outcomes[CONVERTED].kl < 1e-4 * found.outcomes[UNCONVERTED].kl
    monkeypatch.setattr(compare_file, "KEPT", 1)  # one batch at a time
    again = compare(base, str(tiny_data), parts, variants, rows=ROWS, max_rows=6)
    for name, outcome in again.outcomes.items():
        assert outcome.loss == pytest.approx(found.outcomes[name].loss, rel=1e-6)
        assert outcome.agreement == found.outcomes[name].agreement


def test_an_encoder_decoder(tmp_path: Path, tiny_t5: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", color_rows(6))
    path = "encoder.block.0.layer.0.SelfAttention.q"
    weight = BaseWeights(tiny_t5).weight(path)
    generator = torch.Generator().manual_seed(2)
    factors = LoraFactors(
        torch.randn(2, weight.shape[1], generator=generator), torch.randn(weight.shape[0], 2, generator=generator), 1.0
    )
    parts = Parts(BaseWeights(tiny_t5), {path: factors})
    variants = variants_of(parts, {}, torch.float32, 1e-7)
    assert list(variants) == [AS_TRAINED, CONVERTED, BASE]  # nobody serves it as it is
    rows = replace(ROWS, max_length=48)
    found = compare(Base(str(tiny_t5), tiny_t5), str(data), parts, variants, rows=rows, max_rows=64)
    assert found.rows == 6
    assert abs(found.outcomes[CONVERTED].kl) < 1e-3 * found.outcomes[BASE].kl
    assert all(math.isfinite(outcome.loss) for outcome in found.outcomes.values())


def test_a_base_in_4_bits_is_rounded_in_every_linear_layer(tiny_base: Path, tiny_data: Path) -> None:
    """Also where the adapter has nothing."""
    pytest.importorskip("bitsandbytes")
    rounder = nf4_rounder()
    parts = Parts(BaseWeights(tiny_base), {}, {}, requantize=rounder)
    variants = variants_of(parts, {}, torch.float32, 1e-7)
    found = compare(Base(str(tiny_base), tiny_base), str(tiny_data), parts, variants, rows=ROWS, max_rows=4)
    twin = build_llama()
    for path in LLAMA_PATHS:
        twin.get_submodule(path).weight.data = rounder(twin.get_submodule(path).weight)
    loss, _, _ = own_outcome(twin, twin, tiny_base, tiny_data, 4)
    assert found.outcomes[AS_TRAINED].loss == pytest.approx(loss, rel=1e-5)
    assert found.outcomes[BASE].kl > 1e-4


def test_what_does_not_fit_the_model(tiny_base: Path) -> None:
    def swap(paths: list[str], saved: dict[str, Tensor]) -> Swap:
        return Swap(build_llama(), paths, {AS_TRAINED: Variant(BaseWeights(tiny_base).weight, saved)})

    with pytest.raises(InputError, match="GS-3193"):
        swap(["model.layers.9.mlp.up_proj"], {})
    with pytest.raises(InputError, match="GS-3193"):
        swap([], {"score.weight": torch.zeros(2, 32)})
    with pytest.raises(InputError, match="GS-3192"):
        swap([], {"lm_head.weight": torch.zeros(400, 32)})
