"""The real base, and the demo, which the command line runs once for all workers of pytest-xdist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of `gora-serve demo`, and what it printed with --json."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    printed = shared / "demo.json"
    with FileLock(shared / "demo.lock"):
        if not printed.exists():
            printed.with_suffix(".part").write_text(_run_demo(shared / "demo"), encoding="utf-8")
            printed.with_suffix(".part").rename(printed)
    return shared / "demo", json.loads(printed.read_text(encoding="utf-8"))


def _run_demo(folder: Path) -> str:
    command = [sys.executable, "-m", "gora_serve", "demo", "--output", str(folder), "--overwrite", "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=1500, check=False)
    assert done.returncode == 0
    return done.stdout


@pytest.fixture(scope="session")
def demo(demo_run: tuple[Path, dict[str, Any]]) -> Path:
    return demo_run[0]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, byte for byte the demo's base."""
    from gora_serve.training.demo_base import make_smollm2

    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "base")
