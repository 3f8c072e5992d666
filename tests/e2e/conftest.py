"""The demo, run once for the session by the command line; its base and adapters serve all end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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
def smollm2(demo: Path) -> Path:
    """SmolLM2-135M-Instruct, as the demo made it."""
    return demo / "base"
