"""The examples run as a user runs them, with few steps: what they print of themselves must hold."""

from __future__ import annotations

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
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_trainer(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    out = run_example(
        "trainer.py", tiny_base, "--output", output, "--data", tiny_data, "--steps", 6, "--probe-steps", 2
    )  # fmt: skip
    base, start, end, reloaded = (
        number(rf"^loss {words} +(\S+)$", out)
        for words in ("of the base", "before training", "after training", "as PEFT reloads it")
    )
    assert end < start < base
    assert reloaded == pytest.approx(end, abs=1e-4)
    assert verify_adapter(output, base=tiny_base).root
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
