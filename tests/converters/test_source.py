"""Opening a checkpoint: pickles only where they are allowed, and shares of several processes refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from proving import logits_of, prove_exact, train
from tiny_models import build_llama

from converters.reading import Inputs
from converters.source import open_source
from gora_serve.errors import InputError


def test_a_pickle_is_opened_where_it_is_allowed(tmp_path: Path, tiny_base: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = train(get_peft_model(build_llama(), config))
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    with pytest.raises(InputError, match="GS-3110"):
        open_source(tmp_path / "adapter")
    prove_exact(tmp_path / "adapter", tiny_base, tmp_path / "out", logits_of(model), inputs=Inputs(pickles=True))


def test_a_pickle_of_the_old_form(tmp_path: Path) -> None:
    """Before torch 1.6 a file was no zip archive; such a one cannot be mapped."""
    file = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.arange(3.0)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(open_source(tmp_path, pickles=True).tensors["a"], torch.arange(3.0))


@pytest.mark.parametrize("content", [b"not a pickle at all", {"lora": object}])
def test_a_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(InputError, match="GS-3114"):
        open_source(tmp_path, pickles=True)


@pytest.mark.parametrize(
    ("name", "code"),
    [("zero_to_fp32.py", "GS-3111"), ("mp_rank_00_model_states.pt", "GS-3111"), ("__0_0.distcp", "GS-3112")],
)
@pytest.mark.parametrize("stub", [True, False])
def test_shares_of_several_processes(tmp_path: Path, name: str, code: str, stub: bool) -> None:
    """With a weights file of 40 bytes beside them, as a process without weights leaves it, or with none."""
    (tmp_path / name).write_text("")
    if stub:
        (tmp_path / "adapter_model.safetensors").write_bytes(bytes(40))
    with pytest.raises(InputError, match=code):
        open_source(tmp_path)
