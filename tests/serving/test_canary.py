"""The canary's judgment, on answers that are made up; the real engine's are in the end-to-end tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gora_serve.errors import InputError, RunError
from gora_serve.integrity.fingerprint import Expected, fingerprint_json, read_fingerprint
from gora_serve.serving.canary import PROMPTS, WIDEST, Ask, check_canary, tolerance
from gora_serve.serving.served_dtype import served_dtype

BASE = {1: -0.5, 2: -1.5, 3: -2.5, 4: -3.0}
OURS = {1: -2.0, 2: -0.3, 3: -2.4, 4: -4.0}
FILE = Path("gora_manifest.json")


def answering(ours: dict[int, float], base: dict[int, float] = BASE) -> Ask:
    def ask(model: str, tokens: Sequence[int]) -> dict[int, float]:
        assert tokens
        return base if model == "base" else ours

    return ask


def expected(ours: dict[int, float] = OURS) -> tuple[Expected, ...]:
    top = {token: ours[token] for token in (2, 1)}
    return (Expected((7, 8, 9), top, {token: BASE[token] for token in top}),)


def test_an_adapter_that_answers_as_it_was_exported() -> None:
    checked = check_canary("a", "base", expected(), 0.01, answering(OURS | {2: -0.305}))
    assert checked.differs
    assert checked.distance == pytest.approx(0.005)
    assert "within 0.005" in str(checked)


def test_an_adapter_without_a_fingerprint_has_to_differ() -> None:
    assert check_canary("a", "base", (), 0.01, answering(OURS)).distance is None
    with pytest.raises(RunError, match="GS-7350"):
        check_canary("a", "base", (), 0.01, answering(BASE))


def test_an_adapter_that_the_engine_leaves_without_effect() -> None:
    with pytest.raises(RunError, match="GS-7350"):
        check_canary("a", "base", expected(), 0.01, answering(BASE))


def test_an_effect_that_the_dtype_cannot_show_is_no_fault() -> None:
    slight = {token: value + 0.001 for token, value in BASE.items()}
    checked = check_canary("a", "base", expected(slight), 0.25, answering(BASE))
    assert not checked.differs
    assert "too little" in str(checked)


@pytest.mark.parametrize("wrong", [OURS | {2: -0.32}, {1: -2.0, 9: -0.3}, {3: 0.0}])
def test_another_answer(wrong: dict[int, float]) -> None:
    """Off by more than is allowed, and tokens that are no longer among the likeliest."""
    with pytest.raises(RunError, match="GS-7351"):
        check_canary("a", "base", expected(), 0.01, answering(wrong))


@pytest.mark.parametrize("broken", [{1: float("nan")}, {1: float("-inf")}, {}])
def test_answers_that_are_not_finite(broken: dict[int, float]) -> None:
    for ask in (answering(broken), answering(OURS, broken)):
        with pytest.raises(RunError, match="GS-7352"):
            check_canary("a", "base", expected(), 0.01, ask)


def test_every_prompt_is_asked() -> None:
    asked = []

    def ask(model: str, tokens: Sequence[int]) -> dict[int, float]:
        asked.append((model, tuple(tokens)))
        return BASE if model == "base" else OURS

    check_canary("a", "base", (), 0.01, ask)
    assert asked == [(model, prompt) for prompt in PROMPTS for model in ("a", "base")]
    assert max(max(prompt) for prompt in PROMPTS) < 256


def test_a_fingerprint_is_read_as_it_was_written() -> None:
    value = json.loads(json.dumps(fingerprint_json(expected())))
    assert read_fingerprint(value, FILE) == expected()
    assert read_fingerprint(None, FILE) == ()


@pytest.mark.parametrize(
    "value",
    [
        [], {}, {"schema": "gora-serve/canary/2", "prompts": []}, {"schema": "gora-serve/canary/1"},
        *({"schema": "gora-serve/canary/1", "prompts": [one]} for one in (
            {"tokens": [], "top": [[1, 0.0, 0.0]]}, {"tokens": [1], "top": []},
            {"tokens": [-1], "top": [[1, 0.0, 0.0]]},
            {"tokens": [1], "top": [[1, 0.0]]}, {"tokens": [1], "top": [["x", 0.0, 0.0]]}, {"tokens": [1]},
            {"tokens": [1], "top": [[1, "x", 0.0]]}, {"tokens": [True], "top": [[1, 0.0, 0.0]]}, 7,
        )),
    ],
)  # fmt: skip
def test_a_fingerprint_that_is_none(value: object) -> None:
    with pytest.raises(InputError, match="GS-3354"):
        read_fingerprint(value, FILE)


def test_the_tolerance_is_that_of_the_dtype(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    assert tolerance("auto", tmp_path) == tolerance("bfloat16", tmp_path) == WIDEST
    assert tolerance("float32", tmp_path) < tolerance("half", tmp_path) < WIDEST
    assert tolerance("fp8", tmp_path) == WIDEST


def test_auto_serves_a_float32_base_in_bfloat16(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"dtype": "float32"}, "dtype": None}))
    assert tolerance("auto", tmp_path) == WIDEST
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"dtype": "float16"}}))
    assert tolerance("auto", tmp_path) == tolerance("half", tmp_path)


@pytest.mark.parametrize(
    ("types", "served"), [((torch.float16,), "half"), ((torch.float16, torch.float32), "bfloat16")]
)
def test_where_config_says_nothing_the_files_are_asked(
    tmp_path: Path, types: Sequence[torch.dtype], served: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(
        {str(number): torch.ones(2, dtype=one) for number, one in enumerate(types)}, tmp_path / "model.safetensors"
    )
    assert tolerance("auto", tmp_path) == tolerance(served, tmp_path)


@pytest.mark.e2e
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "gemma3_text", "glm4", "qwen3"])
def test_auto_is_what_vllm_makes_of_it(kind: str, stored: str) -> None:
    from vllm.config.model import _resolve_auto_dtype

    made = _resolve_auto_dtype(kind, getattr(torch, stored), is_pooling_model=False)
    assert served_dtype("auto", stored, kind) == str(made).removeprefix("torch.")
