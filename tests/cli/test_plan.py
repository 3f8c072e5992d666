"""`plan` as users run it: what it prints, what it never imports, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shell import TIMEOUT, environment, gora, gora_here, snapshot
from tiny_models import build_llama

GIB = 2**30
ROOM = ("--device", "gpu", "--memory", "4")


def planned(*words: object) -> dict[str, Any]:
    answer = gora_here("plan", *words, "--json")
    assert answer.code == 0, answer.err
    value: dict[str, Any] = json.loads(answer.out)
    return value


def need(value: dict[str, Any], job: str, offload: str, checkpointing: bool) -> dict[str, Any]:
    wanted = (job, offload, checkpointing)
    found = [n for n in value["needs"] if (n["job"], n["offload"], n["gradient_checkpointing"]) == wanted]
    assert len(found) == 1
    return found[0]


def test_plan_tells_parameters_memory_and_what_to_do(tiny_base: Path) -> None:
    before = snapshot(tiny_base)
    answer = gora("plan", tiny_base, *ROOM)
    assert (answer.code, answer.err) == (0, "")
    parameters = sum(parameter.numel() for parameter in build_llama().parameters())
    assert f"{tiny_base}: {parameters:,} parameters (float32)" in answer.out
    assert "fits 4.00 GiB: fit --probe exact (peak " in answer.out
    assert "--probe auto takes exact there" in answer.out
    first = [line.partition("│")[0] for line in answer.out.splitlines() if line.count("│") > 3]
    ways = [" checkpointing", " offload cpu", " offload disk"]
    assert [cell.rstrip() for cell in first] == ["probe exact", *ways, "probe sketch", *ways, "train", *ways]
    assert snapshot(tiny_base) == before


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_widest_table_is_whole_at_80_columns(tiny_base: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = gora_here("plan", tiny_base, "--memory", "4", "--device", device, "--mixed-precision", "bf16")
    head, *rows = answer.out.partition("saved by ")[2].splitlines()
    parts = ["weights", "copies", "tics", "adapter", "tions", "logits"]
    totals = ["fixed", "device", "host"] if device == "gpu" else ["holes", "fixed", "total"]
    assert [name.strip() for name in head.split("┃")[1:]] == [*parts, *totals]
    assert len(rows) == 1 + 12 + 2  # and three lines between
    assert "…" not in answer.out
    assert max(map(len, rows)) <= 80


def test_parts_add_up_and_nothing_is_left_out(tiny_base: Path) -> None:
    value = planned(tiny_base, *ROOM)
    assert len(value["needs"]) == 12
    for one in value["needs"]:
        for side in ("device", "host"):
            parts = one[side]
            assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert value["memory"] == 4 * GIB
    assert value["advice"]["options"] == ["--probe", "exact"]
    assert value["advice"]["peak"] == max(
        need(value, job, "none", False)["device"]["total"] for job in ("probe exact", "train")
    )


def test_options_reach_the_plan(tiny_base: Path) -> None:
    plain = planned(tiny_base, *ROOM)
    train = need(plain, "train", "none", False)["device"]
    changes = {
        ("--rank", "16"): "adapter", ("--batch-size", "16"): "activations", ("--max-length", "1024"): "activations",
        ("--dtype", "bfloat16"): "weights", ("--quantize", "nf4"): "weights", ("--processes", "2"): "adapter",
        ("--targets", "q_proj"): "adapter",
    }  # fmt: skip
    for words, part in changes.items():
        changed = need(planned(tiny_base, *ROOM, *words), "train", "none", False)["device"]
        assert changed[part] != train[part], words
    sharded = planned(tiny_base, *ROOM, "--processes", "2", "--sharded")
    assert {one["offload"] for one in sharded["needs"]} == {"none"}
    sketch = need(planned(tiny_base, *ROOM, "--rank-max", "64"), "probe sketch", "none", False)["device"]
    assert sketch["statistics"] > need(plain, "probe sketch", "none", False)["device"]["statistics"]
    assert planned(tiny_base, "--device", "cpu", "--memory", "4")["needs"][0]["host"]["total"] == 0


def test_without_options_it_looks_at_this_machine(tiny_base: Path) -> None:
    value = planned(tiny_base, "--device", "cpu")
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < value["memory"] <= int(total.split()[1]) * 1024


def test_where_nothing_fits(tiny_base: Path) -> None:
    answer = gora_here("plan", tiny_base, "--device", "gpu", "--memory", "0.1")
    assert answer.code == 0
    needs = planned(tiny_base, *ROOM)["needs"]
    least = max(n["device"]["total"] for n in needs if n["offload"] == "disk" and n["job"] != "probe exact")
    assert f"nothing fits 0.10 GiB: the most sparing settings take {least / GIB:.2f} GiB" in answer.out
    assert planned(tiny_base, "--device", "gpu", "--memory", "0.1")["advice"] is None


def test_an_8b_base_goes_to_the_disk_where_memory_is_short(tmp_path: Path) -> None:
    """From config.json alone: the figures that make the case for offloading."""
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    value = planned(tmp_path, "--device", "gpu", "--memory", "80")
    assert value["parameters"] == 8_030_261_248  # as Meta counts it
    assert value["advice"]["offload"] == "none"
    small = planned(tmp_path, "--device", "gpu", "--memory", "12", "--batch-size", "1")["advice"]
    assert (small["probe"], small["offload"], small["gradient_checkpointing"]) == ("sketch", "cpu", True)


def test_it_imports_nothing_heavy(tiny_base: Path) -> None:
    script = """
import sys
from gora_serve.cli.main import main
assert main(["plan", sys.argv[1]]) == 0
heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "huggingface_hub"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_base)], capture_output=True, text=True, timeout=TIMEOUT,
        env=environment(), check=False,
    )  # fmt: skip
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("words", "gs"),
    [
        (("--memory", "0"), "GS-209"), (("--memory", "nan"), "GS-209"), (("--processes", "0"), "GS-201"),
        (("--sharded",), "GS-201"), (("--rank", "0"), "GS-201"), (("--batch-size", "0"), "GS-201"),
        (("--max-length", "1"), "GS-201"), (("--targets", "no_such"), "GS-203"), (("--targets", "("), "GS-202"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(tiny_base: Path, words: tuple[str, ...], gs: str) -> None:
    answer = gora_here("plan", tiny_base, *words)
    assert (answer.code, answer.gs, answer.out) == (2, gs, "")


def test_shapes_that_only_weights_tell(tiny_gpt2: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_gpt2 / "config.json", tmp_path)
    answer = gora_here("plan", tmp_path, *ROOM)
    assert (answer.code, answer.gs) == (3, "GS-396")
    assert answer.field("expected") == "weights, or one of llama, mistral, qwen2, qwen3"
    assert answer.field("actual") == "gpt2"


def test_bases_that_cannot_be_read(tiny_base: Path, tmp_path: Path) -> None:
    def refused(base: object) -> tuple[int, str | None, str | None]:
        answer = gora_here("plan", base, *ROOM)
        return answer.code, answer.gs, answer.field("file")

    assert refused(tmp_path / "none") == (5, "GS-520", str(tmp_path / "none"))
    assert refused("org/name") == (5, "GS-521", "org/name")
    assert refused(tmp_path) == (3, "GS-366", str(tmp_path))
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    shard = next(base.glob("model-00001*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert refused(base) == (3, "GS-306", str(shard))
    shard.unlink()
    assert refused(base) == (5, "GS-504", str(base))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "\x1b[31m"}))
    answer = gora_here("plan", base, *ROOM)
    assert (answer.code, answer.gs) == (3, "GS-396")
    assert "\x1b" not in answer.out + answer.err
    (base / "config.json").write_text("{")
    assert refused(base) == (3, "GS-319", str(base / "config.json"))
