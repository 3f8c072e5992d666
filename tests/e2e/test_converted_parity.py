"""Adapters that PEFT trained on SmolLM2, converted from their files, give the trained models' numbers: in PEFT on the
untouched base, and served together by a real vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.convert import convert
from converters.reading import Inputs
from converters.receipt import Converted
from gora_serve.config import ServeConfig
from gora_serve.integrity.bases import locate_base
from gora_serve.serving.client import complete, run_all
from gora_serve.serving.engine import Server, free_port, running_server
from gora_serve.serving.start import prepare

pytestmark = [
    pytest.mark.e2e,
    # torch and PEFT warn about their own deprecated calls, and PEFT about the very families that are tested here.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
DATA = Path(__file__).parents[2] / "examples" / "data" / "banking" / "train.jsonl"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ("pissa", "olora", "lora_ga", "adalora")
# Both models are computed in float64, from their float32 files: what differs is the conversion, and not the rounding of
# W0 + dW and of W_res + s B A, which in float32 alone is 1e-4 where logits are 40. LOADED is of the largest log
# probability: W_res itself was rounded to float32, which no adapter holds.
LOADED = 1e-6
SERVED = 5e-4  # log probabilities: vLLM in float32


@dataclass(frozen=True)
class Trained:
    """One family's adapter on disk, trained and initial.

    logprobs: the trained model's, at the last position of each prompt, (N, vocabulary).
    """

    folder: Path
    initial: Path
    logprobs: Tensor


def prompts() -> list[str]:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:40]]
    return [row["prompt"] for row in rows[32:]]


def last_logprobs(model: Any, tokenizer: Any) -> Tensor:
    """Of the model in float64, which the model becomes."""
    model.eval().double()
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1) for text in prompts()]
    return torch.stack(found)


def batches(tokenizer: Any) -> list[dict[str, Tensor]]:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:16]]
    encoded = [tokenizer(f"{row['prompt']} {row['completion']}", return_tensors="pt") for row in rows]
    return [{**one, "labels": one["input_ids"]} for one in encoded]


def config_of(family: str) -> Any:
    from peft import AdaLoraConfig, LoraConfig, LoraGAConfig

    shared: dict[str, Any] = {"lora_alpha": 16, "target_modules": LINEARS}
    if family == "adalora":
        return AdaLoraConfig(init_r=8, target_r=4, tinit=1, tfinal=1, total_step=16, **shared)
    extra = {"lora_ga_config": LoraGAConfig()} if family == "lora_ga" else {}
    return LoraConfig(r=8, init_lora_weights=family, **extra, **shared)


def train(family: str, base: Path, folder: Path) -> Trained:
    """Train as PEFT's users do, in float32, a step for each row."""
    from peft import get_peft_model
    from peft.tuners.lora import preprocess_loraga
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config, rows = config_of(family), batches(tokenizer)
    if family == "lora_ga":
        preprocess_loraga(model, config, lambda: [model(**row).loss.backward() for row in rows[:4]])
    model = get_peft_model(model, config)
    model.save_pretrained(folder / "initial")
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=2e-4)
    model.train()
    for step, row in enumerate(rows):
        optimizer.zero_grad()
        model(**row).loss.backward()
        optimizer.step()
        if family == "adalora":
            model.base_model.update_and_allocate(step)
    model.save_pretrained(folder / "trained")
    return Trained(folder / "trained", folder / "initial", last_logprobs(model, tokenizer))


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    with two_threads():
        return {family: train(family, smollm2, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@contextmanager
def two_threads() -> Iterator[None]:
    """The float32 SVD and QR of an initialisation round otherwise with other threads: 1e-5 of the logits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def converted(
    smollm2: Path, trained: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Converted]:
    """LoRA-GA with its initial adapter; the others from their files and the base alone."""
    base, folder = locate_base(str(smollm2)), tmp_path_factory.mktemp("converted")
    given = {
        family: Inputs(init_adapter=one.initial if family == "lora_ga" else None) for family, one in trained.items()
    }
    with two_threads():
        return {
            family: convert(one.folder, base, folder / family, inputs=given[family]) for family, one in trained.items()
        }


def loaded(base: Path, adapter: Path) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return last_logprobs(PeftModel.from_pretrained(model, adapter), AutoTokenizer.from_pretrained(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_in_peft_on_the_untouched_base(
    smollm2: Path, trained: dict[str, Trained], converted: dict[str, Converted], family: str
) -> None:
    assert converted[family].detection.family == family
    found = loaded(smollm2, converted[family].folder)
    size = float(trained[family].logprobs.abs().max())
    off = float((found - trained[family].logprobs).abs().max())
    print(f"{family}: log probabilities off by {off:.2e} of {size:.1f}")
    assert off < LOADED * size
    others = [one.logprobs for name, one in trained.items() if name != family]
    assert min(float((found - other).abs().max()) for other in others) > 10_000 * LOADED * size


def test_unconverted_lora_ga_is_wrong(smollm2: Path, trained: dict[str, Trained]) -> None:
    """What PEFT makes of it without a word: the reason for all this."""
    found = loaded(smollm2, trained["lora_ga"].folder)
    assert float((found - trained["lora_ga"].logprobs).abs().max()) > 0.1


@pytest.fixture(scope="module")
def server(
    smollm2: Path, converted: dict[str, Converted], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    config = ServeConfig(port=free_port(), dtype="float32", max_model_len=512, served_name="base")
    plan, _ = prepare(str(smollm2), [(family, done.folder) for family, done in converted.items()], config)
    with running_server(plan, log=tmp_path_factory.mktemp("engine") / "engine.log") as running:
        yield running


def test_converted_adapters_are_served_right(smollm2: Path, trained: dict[str, Trained], server: Server) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = [(family, index, tuple(tokenizer(text)["input_ids"])) for index, text in enumerate(prompts())
             for family in FAMILIES]  # fmt: skip
    jobs = [partial(complete, server.url, family, prompt, 1, logprobs=5) for family, _, prompt in asked]
    answers = run_all(jobs, workers=len(jobs))
    worst = dict.fromkeys(FAMILIES, 0.0)
    for (family, index, _), answer in zip(asked, answers, strict=True):
        for token, logprob in answer.top[0].items():
            right = float(trained[family].logprobs[index, token])
            worst[family] = max(worst[family], abs(logprob - right))
    assert max(worst.values()) < SERVED, worst
