"""An adapter merged into SmolLM2 gives the numbers of base plus adapter: in transformers, and served by a real vLLM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.merge_receipt import MergedModel
from converters.merging import merge_model, verify_merged
from gora_serve.config import ServeConfig
from gora_serve.integrity.bases import locate_base
from gora_serve.serving.client import Completion, complete, run_all
from gora_serve.serving.engine import free_port, running_server
from gora_serve.serving.start import prepare

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT = 1e-5  # of the largest logit, in float64 over float32 files
SERVED = 2e-4  # log probabilities: two engines in float32, each 1e-4 from the truth
PROMPTS = (
    "The capital of France is a city on the river Seine, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees Celsius, and it freezes at",
    "Dear colleagues, thank you for your patience. The meeting has been moved to",
)


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA of PEFT on all linear layers, a few steps on one sentence."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    row = AutoTokenizer.from_pretrained(smollm2)(
        "All meetings are on Mondays, and nobody is late.", return_tensors="pt"
    )
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=2e-3)
    for _ in range(6):
        optimizer.zero_grad()
        model(**row, labels=row["input_ids"]).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(smollm2: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> MergedModel:
    """In float32, whatever the base's type is: so that rounding plays no part."""
    from gora_serve.config import MergeConfig

    output = tmp_path_factory.mktemp("merged") / "model"
    return merge_model([(adapter, 1.0)], locate_base(str(smollm2)), output, MergeConfig(dtype="float32"))


def logits(model: Any, tokenizer: Any) -> Tensor:
    model.eval().double()
    with torch.no_grad():
        found: list[Tensor] = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in PROMPTS]
    return torch.stack(found)


def test_logits_are_those_of_base_and_adapter(smollm2: Path, adapter: Path, merged: MergedModel) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    plain = logits(base, tokenizer)
    expected = logits(PeftModel.from_pretrained(base.float(), adapter), tokenizer)
    found = logits(AutoModelForCausalLM.from_pretrained(merged.folder, dtype="auto"), tokenizer)
    size = float(expected.abs().max())
    assert float((found - expected).abs().max()) < EXACT * size
    assert float((plain - expected).abs().max()) > 1000 * EXACT * size


def test_the_merge_is_replayed(smollm2: Path, adapter: Path, merged: MergedModel) -> None:
    check = verify_merged(merged.folder, [(adapter, 1.0)], locate_base(str(smollm2)))
    assert check.replay.verdict == "exact"
    assert len(check.replay.tensors) == len(merged.plan.targets)


def answers(base: Path, adapters: list[tuple[str, Path]], model: str, log: Path) -> list[Completion]:
    """What a server over `base` answers as `model`: one token for each prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    config = ServeConfig(port=free_port(), dtype="float32", max_model_len=512, served_name="base")
    plan, _ = prepare(str(base), adapters, config)
    with running_server(plan, log=log) as running:
        jobs = [partial(complete, running.url, model, tuple(tokenizer(text)["input_ids"]), 1, logprobs=5)
                for text in PROMPTS]  # fmt: skip
        return run_all(jobs, workers=len(jobs))


def test_served_merged_and_unmerged_agree(smollm2: Path, adapter: Path, merged: MergedModel, tmp_path: Path) -> None:
    unmerged = answers(smollm2, [("task", adapter)], "task", tmp_path / "unmerged.log")
    alone = answers(merged.folder, [], "base", tmp_path / "merged.log")
    worst = 0.0
    for one, other in zip(unmerged, alone, strict=True):
        common = one.top[0].keys() & other.top[0].keys()
        assert len(common) >= 4
        worst = max(worst, *(abs(one.top[0][token] - other.top[0][token]) for token in common))
    assert worst < SERVED
