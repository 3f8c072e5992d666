"""A single output file never damages a model, a finished output, or a file of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from gora_serve.cli.main import main
from gora_serve.errors import OutputError, UsageError
from gora_serve.integrity.binding import seal_folder
from gora_serve.integrity.file_targets import Kind, check_file
from gora_serve.integrity.targets import check_target

KINDS: tuple[Kind, ...] = get_args(Kind)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for name in ("model", "sealed"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    seal_folder(tmp_path / "sealed", {})
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_where_no_file_is_written(places: Path, kind: Kind, overwrite: bool) -> None:
    (places / "link").symlink_to(places / "model")
    for folder, code in (("model", "GS-256"), ("model/sub", "GS-256"), ("link", "GS-256"), ("sealed", "GS-258")):
        for name in ("new.json", "config.json"):
            with pytest.raises(UsageError, match=code):
                check_file(places / folder / name, kind, overwrite=overwrite)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("ending", ["", ".index.json"])
def test_whose_folder_is_a_model(tmp_path: Path, weights: str, ending: str) -> None:
    for name in ("config.json", f"{weights}{ending}"):
        (tmp_path / name).write_text("{}")
    for check in (lambda: check_file(tmp_path / "m.json", "manifest", overwrite=False),
                  lambda: check_target(tmp_path / "out")):  # fmt: skip
        with pytest.raises(UsageError, match="GS-256"):
            check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replaced(tmp_path: Path, kind: Kind) -> None:
    examples = {
        "manifest": b'{\n  "schema": "gora-serve/base-manifest/1",\n', "ranks": b'{\n  "schema": "gora-serve/ranks/1",',
        "statement": b'{\n  "_type": "https://in-toto.io/Statement/v1",', "picture": b"\x89PNG\r\n\x1a\n...",
        "page": b"<!doctype html><title>a - gora-serve</title>",
    }  # fmt: skip
    assert examples.keys() == set(KINDS)
    for other, content in {**examples, "mine": b"my notes"}.items():
        file = tmp_path / other
        file.write_bytes(content)
        with pytest.raises(OutputError, match="GS-601"):
            check_file(file, kind, overwrite=False)
        if other == kind:
            check_file(file, kind, overwrite=True)
        else:
            with pytest.raises(UsageError, match="GS-259"):
                check_file(file, kind, overwrite=True)
    check_file(tmp_path / "new", kind, overwrite=False)
    (tmp_path / "empty").touch()
    check_file(tmp_path / "empty", kind, overwrite=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="GS-259"):
        check_file(tmp_path / "folder", kind, overwrite=True)


def test_commands_ask_first(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each file that a command writes can be replaced by the same command, and by no other."""
    file, statement = tmp_path / "m.json", tmp_path / "s.json"
    for _ in range(2):
        assert main(["hash", str(tiny_base), "--output", str(file), "--oms", str(statement), "--overwrite"]) == 0
    probe = {"schema": "gora-serve/probe/1", "base": {}, "mode": "exact", "steps": 1, "samples": 1, "tokens": 1,
             "stopped_early": False, "modules": {"a": {"shape": [8, 8], "importance": 1.0}}}  # fmt: skip
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    before = listing(tmp_path)
    for output in (file, tmp_path / "probe.json"):
        assert main(["ranks", str(tmp_path), "--rank", "2", "--output", str(output), "--overwrite"]) == 2
        assert "GS-259" in capsys.readouterr().err
    assert main(["hash", str(tiny_base), "--output", str(statement), "--overwrite"]) == 2
    assert "GS-259" in capsys.readouterr().err
    assert listing(tmp_path) == before
