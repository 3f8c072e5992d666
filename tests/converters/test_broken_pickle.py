"""Pickles, and what ZeRO and FSDP leave in place of weights: refused by code, file and next step, nothing written."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from proving import converted, logits_of, prove_exact, train
from safetensors.torch import load_file, save_file
from tiny_models import build_llama

from converters.reading import Inputs
from converters.source import open_source
from gora_serve.cli.main import main
from gora_serve.errors import InputError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter in safetensors."""
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    train(get_peft_model(build_llama(), LoraConfig(r=4, target_modules="all-linear"))).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, sound: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


class Malicious:
    """Unpickled without care, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def as_pickle(
    adapter: Path, name: str = "adapter_model.bin", *more: Any, numbered: bool = False, **options: Any
) -> Path:
    """The adapter's tensors as a pickle in the place of the safetensors file, with more beside them."""
    tensors: dict[Any, Any] = load_file(adapter / WEIGHTS)
    tensors = dict(enumerate(tensors.values())) if numbered else tensors
    (adapter / WEIGHTS).unlink()
    torch.save(tensors | {f"more_{index}": one for index, one in enumerate(more)}, adapter / name, **options)
    return adapter / name


def emptied(adapter: Path, *, large_ones_only: bool = False) -> Path:
    """As a process of ZeRO-3 saves: a tensor that it has a share of has shape (0,)."""
    tensors = load_file(adapter / WEIGHTS)
    few = 200 if large_ones_only else 0
    tensors = {name: torch.zeros(0) if one.numel() > few else one for name, one in tensors.items()}
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    return adapter / WEIGHTS


def touch(file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"share")
    return file


def zero_folder(adapter: Path) -> Path:
    """As Trainer with DeepSpeed leaves a checkpoint, without the consolidated weights."""
    touch(adapter / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    touch(adapter / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (adapter / "latest").write_text("global_step10")
    return adapter / "global_step10"


def zero_folder_and_stub(adapter: Path) -> Path:
    emptied(adapter)
    touch(adapter / "zero_to_fp32.py")
    zero_folder(adapter)
    return adapter / "zero_to_fp32.py"


def without_weights(adapter: Path) -> Path:
    (adapter / WEIGHTS).unlink()
    return adapter


def fsdp_folder(adapter: Path) -> Path:
    touch(without_weights(adapter) / "pytorch_model_fsdp_0" / "__0_0.distcp")
    touch(adapter / "pytorch_model_fsdp_0" / "__1_0.distcp")
    touch(adapter / "pytorch_model_fsdp_0" / ".metadata")
    return adapter / "pytorch_model_fsdp_0"


def inside_fsdp_folder(adapter: Path) -> Path:
    touch(adapter / "__0_0.distcp")
    touch(without_weights(adapter) / ".metadata")
    return adapter / "__0_0.distcp"


@dataclass(frozen=True)
class Case:
    """build: breaks the adapter and returns the file that the message must name. says: its next step, or what it saw.

    allowed: whether pickles are.
    """

    code: str
    says: str
    build: Callable[[Path], Path]
    allowed: bool = False


ZERO, FSDP = "zero_to_fp32.py . OUTPUT", "accelerate merge-weights"
CASES = {
    "a .bin that nobody allowed": Case("GS-3110", "--allow-pickle", as_pickle),
    "a .pt that nobody allowed": Case("GS-3110", "--allow-pickle", lambda adapter: as_pickle(adapter, "adapter_0.pt")),
    "a .bin cut short": Case("GS-3114", "safetensors", lambda adapter: cut(as_pickle(adapter)), allowed=True),
    "a .bin without names": Case("GS-3114", "safetensors", lambda adapter: as_pickle(
        adapter, "adapter_model.bin", numbered=True), allowed=True),
    "a .bin of something else": Case("GS-3114", "safetensors", lambda adapter: as_pickle(
        adapter, "adapter_model.bin", "a word"), allowed=True),
    "a .bin with a sparse tensor": Case("GS-3114", "other objects", lambda adapter: as_pickle(
        adapter, "adapter_model.bin", torch.eye(3).to_sparse()), allowed=True),
    "a .bin with a tensor that has no numbers": Case("GS-3114", "other objects", lambda adapter: as_pickle(
        adapter, "adapter_model.bin", torch.empty(3, device="meta")), allowed=True),
    "a .bin with a view of one number a billion times": Case("GS-3114", "other objects", lambda adapter: as_pickle(
        adapter, "adapter_model.bin", torch.zeros(1).expand(10**9)), allowed=True),
    "a .bin with a class": Case("GS-3114", "test_broken_pickle.Malicious", lambda adapter: as_pickle(
        adapter, "adapter_model.bin", Malicious), allowed=True),
    "ZeRO: its folder": Case("GS-3111", ZERO, lambda adapter: zero_folder(without_weights(adapter))),
    "ZeRO: its script": Case("GS-3111", ZERO, lambda adapter: touch(without_weights(adapter) / "zero_to_fp32.py")),
    "ZeRO: inside its folder": Case("GS-3111", ZERO, lambda adapter: touch(
        without_weights(adapter) / "mp_rank_00_model_states.pt")),
    "ZeRO: a share of the optimizer": Case("GS-3111", ZERO, lambda adapter: touch(
        without_weights(adapter) / "zero_pp_rank_0_mp_rank_00_optim_states.pt")),
    "ZeRO: empty tensors": Case("GS-3111", "shape (0,)", emptied),
    "ZeRO: some empty tensors": Case("GS-3111", "shape (0,)", lambda adapter: emptied(adapter, large_ones_only=True)),
    "ZeRO: empty tensors beside the shares": Case("GS-3111", ZERO, zero_folder_and_stub),
    "ZeRO: empty tensors in a pickle": Case("GS-3111", "shape (0,)", lambda adapter: (
        emptied(adapter), as_pickle(adapter))[1], allowed=True),
    "FSDP: its folder": Case("GS-3112", FSDP, fsdp_folder),
    "FSDP: inside its folder": Case("GS-3112", FSDP, inside_fsdp_folder),
    "FSDP: its metadata": Case("GS-3112", FSDP, lambda adapter: touch(without_weights(adapter) / ".metadata")),
}  # fmt: skip


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-500])
    return file


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_it_is_refused_and_nothing_is_written(tmp_path: Path, tiny_base: Path, adapter: Path, name: str) -> None:
    case = CASES[name]
    file = case.build(adapter)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as refused:
        converted(adapter, tiny_base, tmp_path / "out", inputs=Inputs(pickles=case.allowed))
    error = refused.value
    assert (error.code, error.exit_code) == (case.code, 3), str(error)
    assert error.fields["file"] == file
    assert case.says in str(error)
    assert error.fields["try"]
    assert "weights_only" not in str(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [adapter]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused_or_read(tmp_path: Path, zipped: bool) -> None:
    """Cut anywhere, or with a byte changed: torch raises errors of many kinds, we raise one."""
    file, random = tmp_path / "adapter_model.bin", Random(0)
    torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, file, _use_new_zipfile_serialization=zipped)
    data, refusals = file.read_bytes(), []
    cuts = [data[:length] for length in range(0, len(data), 23)]
    for content in cuts + [changed(data, random.randrange(len(data)), random.randrange(256)) for _ in range(200)]:
        file.write_bytes(content)
        try:
            open_source(tmp_path, pickles=True)
        except InputError as error:
            refusals.append(error)
    assert {error.code for error in refusals} == {"GS-3114"}
    assert len(refusals) > len(cuts) // 2
    assert all(error.fields["file"] == file and error.fields["actual"] for error in refusals)


def changed(data: bytes, place: int, byte: int) -> bytes:
    return data[:place] + bytes([byte]) + data[place + 1 :]


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, tiny_base: Path, adapter: Path, form: str) -> None:
    """Though pickles are allowed. The same file does harm where it is loaded without care: the test is no empty one."""
    harm = Malicious(tmp_path / "harm")
    if form == "bare":
        file = adapter / "adapter_model.bin"
        (adapter / WEIGHTS).unlink()
        file.write_bytes(pickle.dumps({"lora": harm}, protocol=2))
        pickle.loads(file.read_bytes())
    else:
        file = as_pickle(adapter, "adapter_model.bin", harm, _use_new_zipfile_serialization=form == "zip")
        torch.load(file, weights_only=False)
    assert harm.target.exists()
    harm.target.unlink()
    for allowed, code in ((False, "GS-3110"), (True, "GS-3114")):
        with pytest.raises(InputError) as refused:
            converted(adapter, tiny_base, tmp_path / "out", inputs=Inputs(pickles=allowed))
        assert (refused.value.code, refused.value.fields["file"]) == (code, file)
        assert sorted(tmp_path.iterdir()) == [adapter]
    assert refused.value.fields["actual"] == f"it would call or build {os.system.__module__}.system"
    assert "safetensors" in str(refused.value.fields["try"])
    assert "weights_only" not in str(refused.value)


def test_an_allowed_pickle_gives_what_safetensors_give(tmp_path: Path, tiny_base: Path, sound: Path) -> None:
    """The same bytes of the weights, their record included."""
    names = ("adapter_model.bin", "adapter_model.pt")
    expected = converted(sound, tiny_base, tmp_path / "expected")
    for index, (name, zipped) in enumerate((name, zipped) for name in names for zipped in (True, False)):
        copy = Path(shutil.copytree(sound, tmp_path / f"adapter-{index}"))
        as_pickle(copy, name, _use_new_zipfile_serialization=zipped)
        done = converted(copy, tiny_base, tmp_path / f"out-{index}", inputs=Inputs(pickles=True))
        assert done.root == expected.root
        assert (done.folder / WEIGHTS).read_bytes() == (expected.folder / WEIGHTS).read_bytes()
        assert list(done.receipt["inputs"]["adapter"]) == [str(copy / name), str(copy / "adapter_config.json")]


def test_whole_weights_beside_the_shares_are_taken(tmp_path: Path, tiny_base: Path, adapter: Path) -> None:
    """A checkpoint of Trainer with ZeRO-2 has both: the shares are the optimizer's, and the adapter is whole."""
    from peft import PeftModel

    zero_folder(adapter)
    touch(adapter / "zero_to_fp32.py")
    logits = logits_of(PeftModel.from_pretrained(build_llama(), adapter))
    prove_exact(adapter, tiny_base, tmp_path / "out", logits)


def test_the_command_line(tmp_path: Path, tiny_base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = as_pickle(adapter)
    words = ["convert", str(adapter), "--base", str(tiny_base), "--output", str(tmp_path / "out")]
    assert main(words) == 3
    told = capsys.readouterr().err
    assert "error[GS-3110] this file is a pickle" in told
    assert f"  file: {file}\n" in told
    assert not (tmp_path / "out").exists()
    assert main([*words, "--allow-pickle"]) == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()
