"""--overwrite replaces what gora-serve wrote whole, and no folder that holds anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gora_serve.errors import UsageError
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.targets import check_target

RUN = json.dumps({"schema": "gora-serve/run/1", "status": "complete"})


def sealed(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    seal_folder(folder, {})
    return folder


def run_at(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(RUN)
    (folder / "metrics.jsonl").write_text("")
    sealed(folder / "adapter", "adapter_config.json")
    sealed(folder / "checkpoints" / "step-2", "state.json")
    (folder / "tracking").mkdir()
    (folder / "tracking" / "events.out.tfevents.1").write_text("")
    return folder


def refused(folder: Path, first: str) -> None:
    with pytest.raises(UsageError, match="GS-257") as raised:
        check_target(folder, overwrite=True)
    assert raised.value.fields["actual"] == first


@pytest.mark.parametrize("mark", ["run.json", "adapter_config.json", "gora_manifest.json"])
@pytest.mark.parametrize("text", ["{}", "[", '{"schema": "other/1", "files": {}}'])
def test_a_marker_alone_makes_no_folder_ours(tmp_path: Path, mark: str, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / mark).write_text(text)
    refused(tmp_path / "out", mark)


def test_an_adapter_of_another_tool_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).write_text("{}")
    refused(tmp_path / "out", "adapter_config.json")


def test_a_file_beyond_the_seal_is_named(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "out", "a", "b")
    (folder / "README.md").write_text("x")
    check_target(folder, overwrite=True)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "one.txt").write_text("x")
    refused(folder, "thesis/one.txt")


@pytest.mark.parametrize("name", ["thesis.txt", "adapter/thesis.txt", "checkpoints/thesis.txt",
                                  "checkpoints/step-2/thesis.txt", "photos/1.jpg"])  # fmt: skip
def test_a_run_is_replaced_unless_it_holds_other_things(tmp_path: Path, name: str) -> None:
    folder = run_at(tmp_path / "run")
    check_target(folder, overwrite=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    refused(folder, name)
