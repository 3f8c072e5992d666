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
    mirror = "models--org--base-unsloth-bnb-4bit/snapshots/0123abcd"
    quantized = tmp_path / "hub" / mirror
    quantized.mkdir(parents=True)
    (quantized / "config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    same = (
        "org/Base",
        "/nowhere/base",
        "D:\\models\\base",
        "org/base-bnb-4bit",
        f"/nowhere/{mirror}/",
        quantized,
        tmp_path / "copy",
    )
    for index, name in enumerate(same):
        naming(tmp_path, name)
        done = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / f"out{index}")
        assert ["nothing proves" in line for line in done.warnings] == [True]


@pytest.mark.parametrize("weights", [None, "pytorch_model.bin", "model.safetensors"])
def test_a_named_folder_whose_weights_cannot_be_hashed_goes_by_its_name(tmp_path: Path, weights: str | None) -> None:
    """What is wrong with a folder that nobody gave is no reason to refuse one that was given."""
    make(tmp_path, build_llama, target_modules=["q_proj"])
    for name in ("other", "elsewhere/base"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(tmp_path / "base" / "config.json", tmp_path / name)
        if weights:
            (tmp_path / name / weights).write_bytes(b"cut off")
    naming(tmp_path, tmp_path / "other")
    with pytest.raises(BindingError, match="GS-4352"):
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    done = converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "plain")
    assert str(tmp_path / "other") in done.warnings[0]
    naming(tmp_path, tmp_path / "elsewhere" / "base")
    done = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert ["nothing proves" in line for line in done.warnings] == [True]


def test_a_base_that_is_called_as_a_mirror_in_4_bits(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    (tmp_path / "base").rename(tmp_path / "base-nf4")
    naming(tmp_path, "/nowhere/base-nf4")
    merged(tmp_path / "adapter", tmp_path / "base-nf4", tmp_path / "out")
    naming(tmp_path, "/nowhere/other-nf4")
    with pytest.raises(BindingError, match="GS-4352"):
        merged(tmp_path / "adapter", tmp_path / "base-nf4", tmp_path / "out2")


@pytest.mark.parametrize("path", [".", "../adapter", "../adapter/checkpoint/.."])
def test_the_next_step_for_an_adapter_that_is_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    naming(tmp_path, "org/other-model")
    (tmp_path / "adapter" / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path / "adapter")
    with pytest.raises(BindingError, match="GS-4352") as caught:
        merged(Path(path), tmp_path / "base", tmp_path / "out")
    output = Path(str(caught.value.fields["try"]).partition("--output ")[2].partition(";")[0])
    assert output.resolve() == tmp_path / "adapter-bound"


def test_the_next_step_for_an_adapter_of_the_hub_lies_outside_of_its_cache(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    naming(tmp_path, "org/other-model")
    snapshot = tmp_path / "models--org--sql" / "snapshots" / "0123abcd"
    shutil.copytree(tmp_path / "adapter", snapshot)
    with pytest.raises(BindingError, match=r"(?s)GS-4352.*--output sql-bound"):
        merged(snapshot, tmp_path / "base", tmp_path / "out")


def test_convert_tells_both_names(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    naming(tmp_path, "org/other-model")
    done = converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert len(done.warnings) == 1
    assert "org/other-model" in done.warnings[0]
    assert str(tmp_path / "base") in done.warnings[0]
