"""What merging and verify say of a base in 4 bits, of sealed merges that were altered, and of what changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from proving import converted, merged
from safetensors.torch import load_file
from test_merging import WEIGHTS, make, quantizer, spoiled, tensors_of
from tiny_models import build_llama

from converters.merging import Checked, merge_model, verify_merged
from gora_serve.cli.render_merge import model_summary, replay_summary
from gora_serve.config import MergeConfig
from gora_serve.errors import InputError, MismatchError
from gora_serve.integrity.bases import Base
from gora_serve.integrity.files import sha256_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


def of(folder: Path, output: str, *weights: float, **settings: Any) -> Any:
    """Merge the adapter, once for each weight."""
    return merge_model(
        [(folder / "adapter", weight) for weight in weights or (1.0,)], Base("base", folder / "base"), folder / output,
        MergeConfig(**settings), rounder=quantizer,  # type: ignore[arg-type]
    )  # fmt: skip


def verify(folder: Path, model: str, **settings: Any) -> Checked:
    given = [(folder / "adapter", 1.0)]
    return verify_merged(folder / model, given, Base("base", folder / "base"), rounder=quantizer, **settings)  # type: ignore[arg-type]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make(tmp_path, lambda: build_llama().bfloat16(), target_modules=["q_proj"])
    return tmp_path


def test_only_a_sealed_receipt_says_what_updates_were_added_to(work: Path) -> None:
    of(work, "out", base_as="nf4")
    done = verify(work, "out")
    assert (done.replay.verdict, done.added_to.base_as) == ("exact", "nf4")
    assert "gora_manifest.json proves" in done.added_to.said_by
    summary = replay_summary(done)
    assert "updates added to what NF4 makes of the weights" in summary.lines[1]
    assert summary.value["base_as"] == "nf4"
    (work / "out" / "gora_manifest.json").unlink()
    done = verify(work, "out")
    assert (done.replay.verdict, done.added_to.base_as) == ("differs", "bf16")
    assert any("give --base-as nf4" in line for line in done.warnings)
    assert verify(work, "out", base_as="nf4").replay.verdict == "exact"
    # a receipt that was written into a sealed folder afterwards is not believed either
    of(work, "plain")
    file = work / "plain" / "merge.json"
    receipt = json.loads(file.read_text())
    receipt["settings"]["base_as"] = "nf4"
    file.write_text(json.dumps(receipt))
    with pytest.raises(MismatchError, match=r"(?s)GS-102.*merge\.json"):
        verify(work, "plain")
    seal = work / "plain" / "gora_manifest.json"
    files = json.loads(seal.read_text())
    files["files"]["merge.json"] = {"size": file.stat().st_size, "sha256": sha256_file(file)[1]}
    seal.write_text(json.dumps(files))
    with pytest.raises(MismatchError, match="GS-116"):
        verify(work, "plain")


def test_a_merge_into_4_bits_by_another_tool(work: Path) -> None:
    model = build_llama().bfloat16()
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data = quantizer()(parameter.data).bfloat16()
    model = PeftModel.from_pretrained(model, work / "adapter", autocast_adapter_dtype=False)
    model.merge_and_unload().save_pretrained(work / "theirs")
    assert verify(work, "theirs", base_as="nf4").replay.verdict == "rounded"
    assert verify(work, "theirs").replay.verdict == "differs"


def test_what_changed_is_counted_against_the_base(work: Path) -> None:
    done = of(work, "out", base_as="nf4")
    base, written = tensors_of(work / "base"), tensors_of(work / "out")
    for name in (Q_PROJ, UP_PROJ):  # with an adapter, and without
        assert done.receipt["tensors"][name]["changed"] == int((written[name] != base[name]).sum()) > 0
    assert not any("nothing is added" in line for line in done.warnings)
    done = of(work, "zero", 0.0, base_as="nf4")
    assert any("nothing is added" in line for line in done.warnings)


def test_the_model_in_training_is_that_of_one_adapter(work: Path) -> None:
    assert "error_on_stored" in of(work, "one", base_as="bf16").receipt["totals"]
    for index, weights in enumerate([(1.0, 0.5), (0.5,)]):
        for base_as in ("bf16", "nf4"):
            done = of(work, f"{base_as}{index}", *weights, base_as=base_as)
            assert "error_on_stored" not in done.receipt["totals"]
            assert not any("model in training" in line for line in model_summary(done).lines)


def test_both_ways_state_the_same_distances_from_the_model_in_training(work: Path) -> None:
    """Over the adapted tensors, also where the others are rounded to 4 bits too."""
    stored, quantized = (of(work, name, base_as=name).receipt["totals"] for name in ("bf16", "nf4"))
    for key in ("error_on_stored", "error_on_quantized"):
        assert stored[key] == pytest.approx(quantized[key], rel=1e-12)


def test_of_several_adapters_the_one_in_4_bits_is_named(work: Path) -> None:
    shutil.copytree(work / "adapter", work / "q")
    file = work / "q" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/base-bnb-4bit"}))
    given = [(work / "adapter", 1.0), (work / "q", 1.0)]
    base = Base("base", work / "base")
    done = merge_model(given, base, work / "both", MergeConfig(), rounder=quantizer)  # type: ignore[arg-type]
    assert "error_on_stored" not in done.receipt["totals"]
    [note] = done.notes
    assert str(work / "q") in note
    assert str(work / "adapter") not in note
    done = merge_model(given[1:], base, work / "one", MergeConfig(), rounder=quantizer)  # type: ignore[arg-type]
    assert "error_on_stored" in done.receipt["totals"]


def test_no_share_of_an_update_that_is_none(work: Path) -> None:
    [table] = model_summary(of(work, "out", 0.0)).tables
    assert [list(column.cells) for column in table.columns if column.header == "stored"] == [["-"]]


def test_a_sealed_merge_that_was_altered_within_rounding_names_the_tensor(work: Path) -> None:
    merged(work / "adapter", work / "base", work / "out")

    def nudged(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16)[3, 5] += 1
        return tensor

    spoiled(work / "out", Q_PROJ, nudged)
    with pytest.raises(MismatchError, match="GS-102") as caught:
        verify(work, "out")
    assert caught.value.fields["tensor"] == Q_PROJ
    assert f"{Q_PROJ}: 1 of " in caught.value.what
    assert Q_PROJ in load_file(Path(str(caught.value.fields["file"])))
    shutil.copy(work / "adapter" / WEIGHTS, work / "out" / "more.bin")  # what is no tensor is named as before
    shutil.rmtree(work / "out")
    merged(work / "adapter", work / "base", work / "out")
    (work / "out" / "generation_config.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"(?s)GS-102.*generation_config\.json") as caught:
        verify(work, "out")
    assert "tensor" not in caught.value.fields


def test_lora_bias_of_a_layer_without_a_bias(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(InputError, match=r"(?s)GS-3400.*lora_bias.*this layer has none") as caught:
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert "one adapter" not in str(caught.value)
    assert caught.value.fields["tensor"] == "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(InputError, match="GS-3115") as caught:  # whose next step is no merge, then
        converted(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert "merge" not in str(caught.value.fields["try"])


def test_a_resized_vocabulary_with_a_weight(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    resized = build_llama()
    resized.resize_token_embeddings(390, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(resized, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"(?s)GS-3403.*weight 1.*weight 0\.5"):
        merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", weight=0.5)
    given = [(tmp_path / "adapter", 1.0)] * 2
    with pytest.raises(InputError, match=r"(?s)GS-3403.*2 updates"):
        merge_model(given, Base("base", tmp_path / "base"), tmp_path / "out")


def test_a_sealed_merge_within_rounding_that_lacks_a_file(tmp_path: Path) -> None:
    make(tmp_path, build_llama, target_modules=["q_proj"])
    of(tmp_path, "out", 1 + 1e-7)
    assert verify(tmp_path, "out").replay.verdict == "rounded"
    (tmp_path / "out" / "generation_config.json").unlink()
    with pytest.raises(MismatchError, match=r"(?s)GS-103.*generation_config\.json"):
        verify(tmp_path, "out")
