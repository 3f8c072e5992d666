"""The engine reads the files that were hashed, and no others: against what vLLM's own loader would take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gora_serve.errors import BindingError, InputError, UsageError
from gora_serve.integrity.layout import INDEX, find_model
from gora_serve.serving.base_weights import refuse_other_weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def in_shards(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    placed = {name: f"model-{name}.safetensors" for name in tensors}
    for name, file in placed.items():
        save_file({name: tensors[name]}, model / file)
    (model / INDEX).write_text(json.dumps({"weight_map": placed}))


def read_by_vllm(folder: Path, load_format: str) -> set[str]:
    """What vLLM's loader lists for a local folder."""
    loader = pytest.importorskip("vllm.model_executor.model_loader.default_loader")
    config = pytest.importorskip("vllm.config").LoadConfig(load_format=load_format)
    files = loader.DefaultModelLoader(config)._prepare_weights(str(folder), None, None, True, None)[1]
    return {Path(file).name for file in files}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "stray", [None, "zz.safetensors", "consolidated.safetensors", "model-old.safetensors", "._model.safetensors"]
)
@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors"])
def test_files_that_vllm_would_read_are_refused(
    model: Path, sharded: bool, stray: str | None, load_format: str
) -> None:
    if sharded:
        in_shards(model)
    if stray:
        save_file({"a": torch.zeros(2)}, model / stray)
    if read_by_vllm(model, load_format) == set(find_model(model).weights):
        refuse_other_weights(model, load_format)
    else:
        with pytest.raises(BindingError, match="GS-4360") as caught:
            refuse_other_weights(model, load_format)
        assert caught.value.fields["file"] == model / str(stray)
        if "--load-format hf" in str(caught.value.fields["try"]):
            refuse_other_weights(model, "hf")
        else:
            assert not sharded


def test_a_file_and_an_index_of_others(model: Path, tmp_path: Path) -> None:
    """transformers reads model.safetensors, vLLM what the index names: two models in one folder."""
    shutil.copytree(model, tmp_path / "other")
    in_shards(tmp_path / "other")
    for file in (tmp_path / "other").glob("model*"):
        shutil.copy(file, model)
    with pytest.raises(InputError, match="GS-3290"):
        find_model(model)


def test_an_index_of_the_one_file(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    assert set(find_model(model).weights) == {"model.safetensors"}
    refuse_other_weights(model)


@pytest.mark.parametrize("load_format", ["dummy", "pt", "npcache", "mistral", "gguf"])
def test_formats_that_read_other_files(model: Path, load_format: str) -> None:
    with pytest.raises(UsageError, match="GS-284"):
        refuse_other_weights(model, load_format)
