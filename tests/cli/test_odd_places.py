"""Paths that cannot be, folders that are another thing, disks that are full, and readers that have gone.

The input's fault is the input's, the output's is the output's, and each message has a next step.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from shell import Answer, command, environment, gora_here

from gora_serve.errors import MachineError
from gora_serve.integrity import bases
from gora_serve.integrity.bases import locate_base
from gora_serve.integrity.files import staged_folder

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(
        {f"{KEY}.lora_A.weight": torch.randn(4, 32), f"{KEY}.lora_B.weight": torch.randn(32, 4)},
        folder / "adapter_model.safetensors",
    )
    configure(folder)
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused(answer: Answer, code: str, *says: str) -> None:
    assert (answer.gs, answer.code) == (code, int(code[3])), answer.err
    assert "  try: " in answer.err, answer.err
    for one in says:
        assert one in answer.err, answer.err


def with_mark(adapter: Path) -> Path:
    file = adapter / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return adapter


def run_of_checkpoints(adapter: Path) -> Path:
    for name in ("checkpoint-20", "checkpoint-100", "task"):
        shutil.copytree(adapter, adapter.parent / "run" / name)
    return adapter.parent / "run"


def of_odd_name(adapter: Path) -> Path:
    return Path(shutil.copytree(adapter, os.fsdecode(bytes(adapter) + b"\xff")))


def nested(adapter: Path) -> Path:
    (adapter / "adapter_config.json").write_text("[" * 100 + "]" * 100)
    return adapter


@pytest.mark.parametrize(
    ("code", "says", "given"),
    [
        ("GS-334", ("/dev/null",), lambda _: Path("/dev/null")),
        ("GS-319", ("adapter_config.json", "byte order mark"), with_mark),
        ("GS-320", ("adapter_config.json",), nested),
        ("GS-3101", ("task, checkpoint-20, checkpoint-100",), run_of_checkpoints),
        ("GS-3146", ("adapter",), of_odd_name),
        ("GS-356", ("modules_to_save",), lambda adapter: configure(adapter, modules_to_save="lm_head")),
    ],
)
def test_adapters(
    adapter: Path, tiny_base: Path, tmp_path: Path, code: str, says: tuple[str, ...], given: Callable[[Path], Path]
) -> None:
    path = given(adapter)
    refused(gora_here("convert", path, "--base", tiny_base, "--output", tmp_path / "place" / "out"), code, *says)
    assert not (tmp_path / "place").exists() or list((tmp_path / "place").iterdir()) == []
    refused(gora_here("gap", path, "--base", tiny_base), code, *says)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "/dev/null/model"])
def test_a_base_that_the_configuration_names_and_no_disk_can_hold(
    adapter: Path, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    configure(adapter, base_model_name_or_path=name)
    assert gora_here("convert", adapter, "--base", tiny_base, "--output", tmp_path / "out").code == 0


def test_bases(adapter: Path, tmp_path: Path) -> None:
    for base, code, says in [
        ("/" + "a" * 3000, "GS-520", "no such base"),
        (adapter, "GS-366", "this folder is an adapter"),
    ]:
        refused(gora_here("convert", adapter, "--base", base, "--output", tmp_path / "out"), code, says)
        refused(gora_here("gap", adapter, "--base", base), code, says)
    assert not (tmp_path / "out").exists()


def test_a_base_in_a_folder_that_nobody_may_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(bases.Path, "exists", denied)
    with pytest.raises(MachineError, match=r"GS-502.*Permission denied"):
        locate_base(str(tmp_path))


def test_files_that_are_not_there(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = ("--base", tiny_base, "--output", tmp_path / "out")
    refused(gora_here("convert", adapter, *out, "--mutated-base", tmp_path / "nope"), "GS-501", "nope")
    refused(gora_here("convert", adapter, *out, "--from", "full", "--rank", "2"), "GS-501", "config.json")
    assert not (tmp_path / "out").exists()


def test_an_output_of_an_odd_name(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    output = os.fsdecode(bytes(tmp_path) + b"/out\xff")
    answer = gora_here("convert", adapter, "--base", tiny_base, "--output", output)
    refused(answer, "GS-239")
    refused(
        gora_here("convert", adapter, "--base", tiny_base, "--output", tmp_path / ("a" * 250)), "GS-505", "too long"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_before_anything_is_chosen(
    adapter: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gora_serve.adapter.spill.save_file", full)
    before = sorted(tmp_path.iterdir())
    answer = gora_here("convert", adapter, "--base", tiny_base, "--output", tmp_path / "out")
    refused(answer, "GS-505", "No space left", "nothing was changed")
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_about_an_input_is_not_the_outputs(tmp_path: Path) -> None:
    for where, code in [(tmp_path / "inputs" / "x", "GS-502"), (None, "GS-505")]:
        with pytest.raises(MachineError, match=code) as caught, staged_folder(tmp_path / "out") as stage:
            raise OSError(errno.EACCES, "Permission denied", str(where or stage / "x"))
        assert {"try", "kept", "file"} <= caught.value.fields.keys()
    assert list(tmp_path.iterdir()) == []


def test_readers_that_have_gone(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """What was written stays, and is said to be in place; an error keeps its exit status."""
    words = ("convert", adapter, "--base", tiny_base, "--output")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*words, tmp_path / "out"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
            check=False,
        )
    assert done.returncode == 5
    assert "GS-507" in done.stderr
    assert "in place" in done.stderr
    assert (tmp_path / "out" / "conversion.json").is_file()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*words, tmp_path / "other", "--from", "nobody", "--json"), stdout=writer, stderr=subprocess.PIPE,
        env=environment(), text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 2
    assert "GS-234" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("name", ["verify", "inspect", "report", "export"])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    more = ("--output", tmp_path / "out") if name == "export" else ()
    answer = gora_here(name, path, *more)
    refused(answer, str(answer.gs), os.strerror(errno.ENAMETOOLONG))
    assert answer.code == 5


def test_links_in_a_circle(tmp_path: Path) -> None:
    ring = tmp_path / "ring"
    ring.symlink_to(ring)
    refused(gora_here("fit", ring, "--data", ring, "--output", ring / "out"), "GS-520")
    refused(gora_here("verify", ring / "in" / "it"), "GS-503")
    refused(gora_here("report", tmp_path, "--output", ring / "page.html"), "GS-240")
    (tmp_path / "run.json").write_text('{"schema": "gora-serve/run/1"}')
    refused(gora_here("report", tmp_path, "--output", ring / "page.html"), "GS-508", str(ring))
