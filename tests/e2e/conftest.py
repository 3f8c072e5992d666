"""The base, and the demo, which the command line runs once.

Two processes share the tests: those of a file stay together, as servers and trainings are a file's, and so do all that
look at the demo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests a process of pytest-xdist takes together (--dist loadgroup)."""
    needs = {item.path for item in items if "demo_run" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("demo" if item.path in needs else item.path.name))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of `gora-serve demo`, and what it printed with --json."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    command = [sys.executable, "-m", "gora_serve", "demo", "--output", str(folder), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=1500, check=False)
    assert done.returncode == 0
    return folder, json.loads(done.stdout)


@pytest.fixture(scope="session")
def demo(demo_run: tuple[Path, dict[str, Any]]) -> Path:
    return demo_run[0]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, with the bytes of the demo's base."""
    from gora_serve.training.demo_base import make_smollm2

    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "base")
