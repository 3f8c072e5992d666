"""A real vLLM with the plugin serves SmolLM2 in float32, adapters have uneven ranks; PEFT in float64 is the oracle.

One start for all: prompts longer than a step, so that they are cut, beside others that decode, on every model at once.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch

from gora_serve.adapter.factors import Adapter, BaseId, LoraFactors
from gora_serve.adapter.format import write_adapter
from gora_serve.adapter.tensors import TensorFiles
from gora_serve.config import ServeConfig
from gora_serve.integrity.layout import find_model
from gora_serve.serving.client import Completion, complete, run_all
from gora_serve.serving.engine import Server, free_port, running_server
from gora_serve.serving.start import prepare
from gora_serve.training.reference import Reference

pytestmark = [
    pytest.mark.e2e,
    # torch and its dependents warn about their own deprecated calls while they are imported and while PEFT is at work.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TOLERANCE = 1e-4
ROUNDING = 0.08  # of bfloat16, after 30 blocks, on average
STEPS = 3
CHUNK = 64  # tokens that a step has at most
LENGTHS = (5, 130, 17)
HEAD = "lm_head"


def draw(seed: int, shapes: Mapping[str, tuple[int, ...]], most: int) -> Adapter:
    """An adapter with ranks from 0 to `most`, drawn for each module."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (out, wide) in shapes.items():
        rank = int(torch.randint(0, most + 1, (), generator=generator))
        if rank:
            a = torch.randn(rank, wide, generator=generator) / wide**0.5  # (r, in)
            b = torch.randn(out, rank, generator=generator) * 0.02  # (out, r)
            modules[path] = LoraFactors(a, b, 2.0)
    return Adapter(modules, BaseId("base"))


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of all linear layers, one of the head and of a few others."""
    weights = shapes_of(smollm2)
    linear = {path: shape for path, shape in weights.items() if path.endswith("_proj")}
    vocabulary, hidden = weights["model.embed_tokens"]
    some = {path: shape for path, shape in linear.items() if ".7." in path or path.endswith("k_proj")}
    made = {
        "small": draw(1, linear, 9),
        "large": draw(2, linear, 32),
        "head": draw(6, some | {HEAD: (vocabulary, hidden)}, 5),
    }
    assert HEAD in made["head"].modules
    folder = tmp_path_factory.mktemp("adapters")
    for name, adapter in made.items():
        (folder / name).mkdir()
        write_adapter(folder / name, adapter, "native" if name == "large" else "unit")
    return {name: folder / name for name in made}


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of its weight."""
    tensors = TensorFiles(find_model(base).weights.values())
    return {name.removesuffix(".weight"): tensors.shape(name) for name in tensors}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine") / "engine.log"


@pytest.fixture(scope="module")
def server(smollm2: Path, adapters: dict[str, Path], log: Path) -> Iterator[Server]:
    options = ["--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "16"]
    with serving(smollm2, adapters, options, log) as running:
        yield running


@contextmanager
def serving(
    base: Path, adapters: Mapping[str, Path], options: Sequence[str], log: Path, dtype: str = "float32"
) -> Iterator[Server]:
    config = ServeConfig(port=free_port(), dtype=dtype, max_model_len=512, served_name="base", plugin=True)
    plan, warnings = prepare(str(base), list(adapters.items()), config, options)
    assert not [warning for warning in warnings if "plugin is off" in warning]
    with running_server(plan, log=log) as running:
        yield running


def prompts(seed: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(100, 40_000, (length,), generator=generator).tolist() for length in lengths]


def ask(server: Server, asked: Sequence[tuple[str, list[int]]], *, at_once: int) -> list[Completion]:
    return run_all([partial(complete, server.url, *one, STEPS, logprobs=5) for one in asked], workers=at_once)


@pytest.fixture(scope="module")
def reference(smollm2: Path, adapters: dict[str, Path]) -> Reference:
    """PEFT in float64: in float32 its own answers are up to 3e-5 away from these."""
    return Reference(smollm2, adapters, torch.float64)


def differences(
    reference: Reference, asked: Sequence[tuple[str, list[int]]], answers: Sequence[Completion]
) -> dict[str, list[float]]:
    """The differences of log probabilities to PEFT's, by model."""
    found: dict[str, list[float]] = {}
    for (model, prompt), answer in zip(asked, answers, strict=True):
        served = [next(iter(step)) for step in answer.top]
        rows = reference.logprobs(None if model == "base" else model, [*prompt, *served[:-1]], len(served))
        for step, row in zip(answer.top, rows, strict=True):
            found.setdefault(model, []).extend(abs(value - float(row[token])) for token, value in step.items())
    return found


def largest(
    reference: Reference, asked: Sequence[tuple[str, list[int]]], answers: Sequence[Completion]
) -> dict[str, float]:
    return {model: max(found) for model, found in differences(reference, asked, answers).items()}


def test_the_plugin_is_at_work(server: Server, log: Path) -> None:
    told = log.read_text(encoding="utf-8", errors="replace")
    assert "Using PooledPunicaWrapper" in told
    assert "LoRA buffers:" in told


def test_a_mixed_batch_is_answered_as_peft_answers(server: Server, reference: Reference) -> None:
    """All models at once, neighbors on different ones, prompts in pieces."""
    asked = [(model, prompt) for prompt in prompts(0) for model in server.models]
    worst = largest(reference, asked, ask(server, asked, at_once=len(asked)))
    assert sorted(worst) == sorted(server.models)
    assert all(value < TOLERANCE for value in worst.values()), worst


def test_each_model_alone_is_answered_as_peft_answers(server: Server, reference: Reference) -> None:
    """One request at a time, and the base and one adapter side by side, in both orders."""
    short, long = prompts(1, [9, 70])
    asked = [(model, short) for model in server.models]
    worst = largest(reference, asked, ask(server, asked, at_once=1))
    assert all(value < TOLERANCE for value in worst.values()), worst
    for name in server.models[2:]:
        asked = [("base", long), (name, short), ("base", short), (name, long)]
        worst = largest(reference, asked, ask(server, asked, at_once=4))
        assert all(value < TOLERANCE for value in worst.values()), (name, worst)


def test_the_tokens_of_prompts_are_told_as_peft_tells_them(server: Server, reference: Reference) -> None:
    """`prompt_logprobs`, of all models at once and of each alone: the head of every token is that of its request."""
    for at_once in (6, 1):
        asked = [
            (model, prompt) for prompt in prompts(4, (70, 9))[: 2 if at_once > 1 else 1] for model in server.models
        ]
        jobs = [partial(told_of_prompt, server.url, *one) for one in asked]
        for (model, prompt), told in zip(asked, run_all(jobs, workers=at_once), strict=True):
            rows = reference.logprobs(None if model == "base" else model, prompt, len(prompt))
            right = [float(row[token]) for row, token in zip(rows[:-1], prompt[1:], strict=True)]
            assert max(abs(one - other) for one, other in zip(told, right, strict=True)) < TOLERANCE, (model, at_once)


def told_of_prompt(url: str, model: str, prompt: list[int]) -> list[float]:
    """Ask for the log probability of every token of a prompt but the first."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}
    asking = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asking, timeout=300) as answer:
        told = json.load(answer)["choices"][0]["prompt_logprobs"]
    return [float(one[str(token)]["logprob"]) for one, token in zip(told[1:], prompt[1:], strict=True)]


def test_the_comparison_can_fail(server: Server, reference: Reference) -> None:
    asked = [(model, prompts(2)[2]) for model in server.models]
    answers = ask(server, asked, at_once=4)
    others = [*asked[1:], asked[0]]
    assert min(largest(reference, others, answers).values()) > 10 * TOLERANCE


def test_packed_layers_answer_as_peft_answers(
    smollm2: Path, adapters: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """In bfloat16 on a processor with the kernel: few tokens and many, one adapter and all. The answers of an adapter
    are about as far from float64 as bfloat16 makes those of the base, and those of another model are much farther.
    """
    log = tmp_path / "engine.log"
    with serving(smollm2, adapters, ["--max-num-batched-tokens", "512"], log, "bfloat16") as server:
        packed = re.search(r"(\d+) of the layers are packed", log.read_text(encoding="utf-8", errors="replace"))
        alone = [(model, prompt) for prompt in prompts(5, (5, 17)) for model in server.models]
        mixed = [(model, prompt) for prompt in prompts(6, (120, 40, 9)) for model in server.models]
        told = [(asked, ask(server, asked, at_once=at_once)) for asked, at_once in ((alone, 1), (mixed, len(mixed)))]
    assert packed
    assert (int(packed[1]) > 100) == torch.cpu._is_avx512_bf16_supported()
    for asked, answers in told:
        own = {model: fmean(found) for model, found in differences(reference, asked, answers).items()}
        wrong = {
            model: fmean(found) for model, found in differences(reference, [*asked[1:], asked[0]], answers).items()
        }
        assert max(own.values()) < 1.5 * own["base"] < 1.5 * ROUNDING, own
        assert min(wrong.values()) > 2 * ROUNDING, wrong


@pytest.mark.slow
@pytest.mark.parametrize("caching", ["--enable-prefix-caching", "--no-enable-prefix-caching"])
def test_batches_of_any_size(
    smollm2: Path, adapters: dict[str, Path], reference: Reference, tmp_path: Path, caching: str
) -> None:
    """From 1 to 64 requests at once, models drawn for each; prompts that share their start, and are asked again."""
    shared = prompts(3, [48])[0]
    with serving(smollm2, adapters, [caching, "--max-num-seqs", "64"], tmp_path / "engine.log") as server:
        for size in (1, 2, 3, 8, 33, 64):
            drawn = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(size)).tolist()
            ends = prompts(size, [1 + number % 9 for number in range(size)])
            asked = [(server.models[which], shared + end) for which, end in zip(drawn, ends, strict=True)]
            for _ in range(2):
                worst = largest(reference, asked, ask(server, asked, at_once=size))
                assert all(value < TOLERANCE for value in worst.values()), (size, worst)
