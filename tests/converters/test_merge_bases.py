"""Adapters that nothing binds and that name a base: merged into that one, and into no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from proving import converted, merged
from test_merging import make
from tiny_models import build_llama

from converters.combining import merge_adapters
from gora_serve.errors import BindingError
from gora_serve.integrity.bases import Base

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def naming(folder: Path, name: object) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(name)}))


def test_another_name_is_refused_and_the_same_elsewhere_is_not(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    base = Base(str(tmp_path / "base"), tmp_path / "base")
    build_llama(5).save_pretrained(tmp_path / "other")
    for name in ("org/other-model", "/nowhere/other-model", tmp_path / "other"):
        naming(tmp_path, name)
        for write in (
            lambda: merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out"),
            lambda: merge_adapters([(tmp_path / "adapter", 1.0)], base, tmp_path / "out"),
        ):
            with pytest.raises(BindingError, match=r"(?s)GS-4352.*other.*gora-serve bind") as caught:
                write()
            assert str(caught.value.fields["file"]).endswith("adapter_config.json")
        assert not (tmp_path / "out").exists()
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    for index, name in enumerate(("org/Base", "/nowhere/base", "org/base-bnb-4bit", tmp_path / "copy")):
        naming(tmp_path, name)
        done = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / f"out{index}")
        assert ["nothing says" in line for line in done.warnings] == [True]


def test_convert_tells_both_names(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    naming(tmp_path, "org/other-model")
    done = converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert len(done.warnings) == 1
    assert "org/other-model" in done.warnings[0]
    assert str(tmp_path / "base") in done.warnings[0]
