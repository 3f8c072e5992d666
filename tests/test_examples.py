"""The examples run as a user runs them, with few steps: what they print of themselves must hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gora_serve.integrity.verify import verify_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *words: object) -> str:
    """Run an example in a process of its own and return what it printed."""
    done = started(name, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern} is not in {text}"
    return float(found.group(1))


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed (the extra `examples`)")
def test_vision() -> None:
    out = run_example("vision.py", "--base-steps", 30, "--steps", 6)
    loss = {
        name: number(rf"^{name} +.* (\d+\.\d+) +\d\.\d+$", out)
        for name in ("new head", "lora, before training", "lora", "gora, before training", "gora")
    }
    assert loss["lora, before training"] == loss["new head"], "B is 0"
    assert loss["gora, before training"] < loss["new head"]
    assert loss["gora"] < loss["gora, before training"]
    lora, gora = (number(rf"^{method} +(\d+) ", out) for method in ("lora", "gora"))
    assert 0.9 * lora < gora <= lora
    assert number(r"differs by (\S+)$", out) < 1e-5


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed (the extra `examples`)")
@pytest.mark.parametrize("words", [("--rank", 0), ("--steps", -1), ("--base-steps", "x")])
def test_vision_refuses_counts_that_are_none(words: tuple[str, object]) -> None:
    done = started("vision.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument {words[0]}: invalid count value: '{words[1]}'" in done.stderr


@pytest.mark.parametrize(
    ("base", "words", "status", "code"),
    [
        ("tiny_base", ("--rank", 0), 2, "GS-201"),
        ("tiny_base", ("--max-length", 257), 2, "GS-205"),
        ("tiny_base", ("--output", "."), 6, "GS-601"),
        ("tiny_t5", (), 3, "GS-345"),
    ],
)
def test_trainer_refuses_as_fit_does(
    base: str, words: tuple[object, ...], status: int, code: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Before anything is trained, and without a traceback."""
    (tmp_path / "there").mkdir()
    words = tuple(tmp_path / "there" if word == "." else word for word in words)
    done = started("trainer.py", request.getfixturevalue(base), "--output", tmp_path / "adapter", *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert f"error[{code}]" in done.stderr
    assert "Traceback" not in done.stderr


needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed (the extra `examples`)")


@pytest.mark.parametrize("words", [(), pytest.param(("--trl",), marks=needs_trl)], ids=["transformers", "trl"])
def test_trainer(words: tuple[str, ...], tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    out = run_example(
        "trainer.py", tiny_base, "--output", output, "--data", tiny_data, "--steps", 6, "--probe-steps", 2, *words
    )  # fmt: skip
    base, start, end, reloaded = (
        number(rf"^loss {words} +(\S+)$", out)
        for words in ("of the base", "before training", "after training", "as PEFT reloads it")
    )
    assert end < start < base
    assert reloaded == pytest.approx(end, abs=1e-4)
    assert verify_adapter(output, base=tiny_base).root
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_gap(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """GoRA is right on the untouched base at once, the other two once they are converted."""
    output = tmp_path / "gap"
    out = run_example(
        "gap.py", "--base", tiny_base, "--output", output, "--data", tiny_data, "--eval-data", tiny_data,
        "--steps", 4, "--probe-steps", 2, "--rank", 4, "--eval-rows", 16,
    )  # fmt: skip
    record = json.loads((output / "gap.json").read_text())
    found = record["methods"]
    assert all(one["trained"]["loss"] < record["base_loss"] for one in found.values())
    assert found["gora"]["as_it_is"]["kl"] < 1e-6
    for method in ("pissa", "lora_ga"):
        assert found[method]["family"] == method
        assert found[method]["converted"]["kl"] < 1e-6
        assert found[method]["converted"]["loss"] == pytest.approx(found[method]["trained"]["loss"], abs=1e-4)
        assert found[method]["as_it_is"]["kl"] > 1e-3
    assert {method: one["peft_edits_the_base"] for method, one in found.items()} == {
        "pissa": True, "lora_ga": False, "gora": False,
    }  # fmt: skip
    assert record["gora_after_peft_loaded_pissa_onto_its_base"]["kl"] > 1e-3
    assert re.search(r"^GoRA .*\(100%\) +not needed$", out, re.MULTILINE)
    assert (output / "gap.png").exists() == (find_spec("matplotlib") is not None)


def test_gap_refuses_an_output_that_is_there(tiny_base: Path, tmp_path: Path) -> None:
    done = started("gap.py", "--base", tiny_base, "--output", tmp_path)
    assert (done.returncode, done.stdout) == (6, "")
    assert "error[GS-601]" in done.stderr
