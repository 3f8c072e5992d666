"""A real vLLM serves SmolLM2 with two adapters of mixed ranks; the float32 logits of PEFT say what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gora_serve.serving.client import ChatRequest, Completion, ask_all, complete, run_all
from gora_serve.serving.engine import Server, find_engine, free_port, running_server
from gora_serve.serving.plan import ServeConfig, plan_server, read_served_adapters, with_device
from gora_serve.serving.process import session_members

pytestmark = [
    pytest.mark.e2e,
    # torch and its dependents warn about their own deprecated calls while they are imported and while PEFT is at work.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TOLERANCE = 1e-4
STEPS = 2  # the prompt's last position, and one decoding step
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT's own pattern form: keys are ends of module paths.
PATTERNS: Mapping[str, Mapping[str, Any]] = {
    "mixed": {
        "r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": LINEAR,
        "rank_pattern": {r"layers\.3\.mlp\.down_proj": 16, "q_proj": 8, "v_proj": 1},
    },
    "sparse": {
        "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 5, r"layers\.20\.self_attn\.o_proj": 11},
        "alpha_pattern": {r"layers\.[0-9]\.self_attn\.q_proj": 24},
    },
}  # fmt: skip
PROMPTS = (
    "The capital of France is a city on the river Seine, and the capital of Italy is",
    "Book a table for four people at an Italian restaurant near the station tomorrow evening at",
    "Question: a train leaves at nine and arrives at noon. How many hours does the journey take? Answer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a small village at the foot of a mountain, where every winter",
    "Play some quiet jazz in the living room and turn the volume down to",
    "Water boils at one hundred degrees Celsius, and it freezes at",
    "Dear colleagues, thank you for your patience. The meeting has been moved to",
)


@dataclass(frozen=True)
class Case:
    """One request and its answer."""

    model: str
    prompt: tuple[int, ...]
    answer: Completion


@pytest.fixture(scope="module")
def peft_model(smollm2: Path) -> Any:
    """The base in float32 with both adapters, B small, random and not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model: Any = None
    for name, settings in PATTERNS.items():
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    return model.eval()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine") / "engine.log"


@pytest.fixture(scope="module")
def server(smollm2: Path, peft_model: Any, tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    peft_model.save_pretrained(folder)  # one folder for each adapter
    adapters = read_served_adapters([(name, folder / name) for name in PATTERNS])
    assert [adapter.max_rank for adapter in adapters] == [16, 11]
    config = ServeConfig(port=free_port(), dtype="float32", max_model_len=512, served_name="base")
    plan = plan_server(smollm2, adapters, with_device(config, find_engine().device))
    with running_server(plan, log=log) as running:
        yield running
    assert session_members(running.pid) == ()


@pytest.fixture(scope="module")
def cases(smollm2: Path, server: Server) -> list[Case]:
    """One concurrent batch of all prompts on the base and both adapters, neighbors on different models."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = [(model, tuple(tokenizer(prompt)["input_ids"])) for prompt in PROMPTS for model in server.models]
    assert len(asked) >= 24
    jobs = [partial(complete, server.url, model, prompt, STEPS, logprobs=5) for model, prompt in asked]
    answers = run_all(jobs, workers=len(jobs))
    return [Case(model, prompt, answer) for (model, prompt), answer in zip(asked, answers, strict=True)]


def peft_logprobs(model: Any, case: Case, name: str) -> Any:
    """PEFT's log probabilities at each generated position, given the served tokens; (STEPS, vocabulary)."""
    import contextlib

    import torch

    served = [next(iter(step)) for step in case.answer.top]
    tokens = torch.tensor([[*case.prompt, *served[:-1]]])  # (1, prompt + STEPS - 1)
    if name != "base":
        model.set_adapter(name)
    context = model.disable_adapter() if name == "base" else contextlib.nullcontext()
    with context, torch.no_grad():
        return model(tokens).logits[0, -STEPS:].log_softmax(-1)


def largest_difference(model: Any, cases: list[Case], *, shift: int = 0) -> dict[str, float]:
    """The largest difference of a top-5 log probability to PEFT's, by model; `shift` compares with another model's."""
    names = ["base", *PATTERNS]
    worst = dict.fromkeys(names, 0.0)
    for case in cases:
        expected = peft_logprobs(model, case, names[(names.index(case.model) + shift) % len(names)])
        for step, row in zip(case.answer.top, expected, strict=True):
            assert len(step) >= 5
            found = max(abs(value - float(row[token])) for token, value in step.items())
            worst[case.model] = max(worst[case.model], found)
    return worst


def test_served_logprobs_are_those_of_peft(
    peft_model: Any, cases: list[Case], record_property: Callable[[str, object], None]
) -> None:
    worst = largest_difference(peft_model, cases)
    record_property("largest difference", worst)
    assert all(value < TOLERANCE for value in worst.values()), worst


def test_the_comparison_can_fail(peft_model: Any, cases: list[Case]) -> None:
    """Compared with another model's logits, every model is far off: the adapters do differ."""
    worst = largest_difference(peft_model, cases, shift=1)
    assert all(value > 100 * TOLERANCE for value in worst.values()), worst


def test_chat_answers_come_in_order(server: Server) -> None:
    requests = [
        ChatRequest(model, [{"role": "user", "content": "Name a color."}], max_tokens=6)
        for model in (*server.models, *server.models)
    ]
    answers = ask_all(server.url, requests, workers=6)
    assert all(answers)
    assert answers[:3] == answers[3:]
