"""`plan -a` as users run it: slots, what fits, what forces a rank. vLLM's own arithmetic is spelled out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from shell import TIMEOUT, environment, gora_here, snapshot

REPOSITORY = Path(__file__).parents[2]
MIB, GIB = 2**20, 2**30
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Llama 3.1 8B, of which there is a configuration alone."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def path_of(leaf: str, layer: int = 0) -> str:
    return f"model.layers.{layer}.{'self_attn' if leaf[0] in 'qkvo' else 'mlp'}.{leaf}"


def adapter(tmp_path: Path, name: str, ranks: Mapping[str, int]) -> Path:
    """An adapter with these modules of layer 0, or of LAYER:leaf."""
    folder = tmp_path / name
    folder.mkdir()
    paths = {path_of(*reversed(leaf.split(":"))) if ":" in leaf else path_of(leaf): leaf for leaf in ranks}
    by_path = {path: ranks[leaf] for path, leaf in paths.items()}
    config = {
        "peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": 16, "bias": "none",
        "target_modules": sorted(by_path), "rank_pattern": {f"^{path}$": rank for path, rank in by_path.items()},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {}
    for path, rank in by_path.items():
        out, inside = SHAPES[path.rpartition(".")[2]]
        arrays[f"base_model.model.{path}.lora_A.weight"] = np.zeros((rank, inside), np.float16)  # (r, in)
        arrays[f"base_model.model.{path}.lora_B.weight"] = np.zeros((out, rank), np.float16)  # (out, r)
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def planned(base: Path, *words: object) -> dict[str, Any]:
    answer = gora_here("plan", base, "--memory", "80", "--device", "gpu", *words, "--json")
    assert answer.code == 0, answer.err
    value: dict[str, Any] = json.loads(answer.out)
    return value


def whole(tmp_path: Path, name: str, rank: int) -> Path:
    return adapter(tmp_path, name, dict.fromkeys(SHAPES, rank))


@pytest.mark.parametrize(("rank", "mib"), [(16, 80), (32, 160), (64, 320), (512, 2560)])
def test_a_slot_of_llama_8b(base: Path, tmp_path: Path, rank: int, mib: int) -> None:
    """All linear layers in bfloat16: known figures of vLLM's buffers, max_lora_rank * sum(in + out) * 2 bytes."""
    value = planned(base, "-a", whole(tmp_path, "a", rank))
    assert value["slot_bytes"] == mib * MIB
    assert value["wrapped_layers"] == 7 * 32
    assert value["max_lora_rank"] == rank


def test_one_module_forces_the_bucket(base: Path, tmp_path: Path) -> None:
    good = whole(tmp_path, "good", 8)
    odd = adapter(tmp_path, "odd", {**dict.fromkeys(SHAPES, 8), "3:down_proj": 33})
    value = planned(base, "-a", f"a={good}", "-a", odd)
    assert value["max_lora_rank"] == 64
    assert value["slots_bytes"] == 2 * 320 * MIB
    assert value["lower"] == {
        "max_lora_rank": 32, "saved_bytes": 320 * MIB,
        "forcing": {"odd": {"model.layers.3.mlp.down_proj": 33}},
    }  # fmt: skip
    answer = gora_here("plan", base, "-a", f"a={good}", "-a", odd, "--memory", "80", "--device", "gpu")
    assert "2 slots of 320.0 MiB at --max-lora-rank 64, 640.0 MiB in all (224 layers)" in answer.out
    assert "at --max-lora-rank 32 all slots would take 320.0 MiB less (50%): fit --rank-max 32" in answer.out
    assert "odd: model.layers.3.mlp.down_proj (rank 33) alone forces 64" in answer.out


def test_how_full_a_slot_is(base: Path, tmp_path: Path) -> None:
    """All seven modules of one of 32 layers, at half the rank of the bucket."""
    value = planned(base, "-a", whole(tmp_path, "a", 8), "-a", whole(tmp_path, "b", 16))
    half, full = value["adapters"]
    assert half["fill"] == pytest.approx(1 / 64)
    assert full["fill"] == pytest.approx(1 / 32)
    assert half["padded_bytes"] == half["file_bytes"]
    assert (half["bucket"], full["bucket"]) == (8, 16)


def test_how_many_fit(base: Path, tmp_path: Path) -> None:
    words = ("-a", whole(tmp_path, "a", 64))
    weights = 8_030_261_248 * 2
    value = planned(base, *words)
    assert value["weights_bytes"] == weights
    assert value["adapters_that_fit"] == (80 * GIB - weights - GIB) // (320 * MIB)
    assert planned(base, *words, "--memory", "15")["adapters_that_fit"] == 0
    assert value["engine_bytes"] is None
    cpu = planned(base, *words, "--device", "cpu", "--no-plugin")
    assert cpu["slots"] == 2, "one stays empty"
    assert cpu["slot_bytes"] == value["slot_bytes"]
    room = 80 * GIB - weights - GIB - cpu["engine_bytes"]
    assert cpu["adapters_that_fit"] == room // (320 * MIB) - 1
    assert "do not fit" in planned(base, *words, "--memory", "15")["notes"][0]


def test_only_packed_layers_that_are_touched_are_wrapped(base: Path, tmp_path: Path) -> None:
    """vLLM packs q, k and v: whoever adapts q has buffers for all three."""
    value = planned(base, "-a", adapter(tmp_path, "a", {"q_proj": 16}))
    sides = sum(sum(SHAPES[leaf]) for leaf in ("q_proj", "k_proj", "v_proj"))
    assert value["wrapped_layers"] == 3 * 32
    assert value["slot_bytes"] == 32 * sides * 16 * 2


def two(tmp_path: Path) -> tuple[tuple[Path, Path], int, int]:
    """Two adapters, and the elements of each."""
    first = {**dict.fromkeys(SHAPES, 5), "3:down_proj": 33}
    second = {"q_proj": 16, "3:down_proj": 2}
    folders = adapter(tmp_path, "first", first), adapter(tmp_path, "second", second)
    sides = {leaf: sum(SHAPES[leaf.rpartition(":")[2]]) for leaf in first}
    a, b = (sum(rank * sides[leaf] for leaf, rank in ranks.items()) for ranks in (first, second))
    return folders, a, b


def test_on_a_cpu_it_is_what_the_plugin_makes(base: Path, tmp_path: Path) -> None:
    """Each adapter has the rows of its own ranks; no module sets the size of another, and no slot is empty."""
    (first, second), a, b = two(tmp_path)
    words = ("-a", first, "-a", second, "--device", "cpu", "--dtype", "float32")
    value = planned(base, *words)
    assert (value["plugin"], value["layout"], value["lower"]) == (True, "pools", None)
    assert value["buffers_bytes"] == 4 * (a + b)
    assert value["layers"] == 4 * 32, "q, k and v are one, gate and up are one"
    assert [one["bytes"] for one in value["adapters"]] == [4 * a, 4 * b]
    padded = [one["padded_bytes"] for one in value["adapters"]]
    sides = sum(map(sum, SHAPES.values())) + sum(SHAPES["down_proj"])
    assert padded == [4 * 64 * sides, 4 * 16 * (sum(SHAPES["q_proj"]) + sum(SHAPES["down_proj"]))]
    room = 80 * GIB - value["weights_bytes"] - GIB - value["engine_bytes"]
    assert value["adapters_that_fit"] == 2 * room // (4 * (a + b))
    told = gora_here("plan", base, *words, "--memory", "80")
    assert f"{4 * (a + b) / MIB:.1f} MiB of LoRA buffers in 128 layers" in told.out
    assert "GiB of KV cache and about 2.0 GiB of the engine itself" in told.out
    assert "--form padded takes more" in told.out
    assert "--max-lora-rank" not in told.out
    assert "--rank-max" not in told.out


def test_vllms_own_layers_and_the_plugin_where_they_are_asked_for(base: Path, tmp_path: Path) -> None:
    (first, second), _, _ = two(tmp_path)
    words = ("-a", first, "-a", second)
    stock = planned(base, *words, "--device", "cpu", "--no-plugin")
    assert (stock["layout"], stock["slots_bytes"]) == ("slots", 3 * 320 * MIB)
    assert any("one slot stays empty" in note for note in stock["notes"])
    gpu = planned(base, *words)
    assert (gpu["plugin"], gpu["layout"], gpu["slots_bytes"]) == (False, "slots", 2 * 320 * MIB)
    sized = planned(base, *words, "--plugin")
    qkv = sum(sum(SHAPES[leaf]) for leaf in ("q_proj", "k_proj", "v_proj"))
    extra = 8 * qkv + (64 - 8) * sum(SHAPES["down_proj"])  # 16 in layer 0, 64 in layer 3, and what vLLM warms up with
    assert (sized["layout"], sized["slot_bytes"]) == ("layers", 40 * MIB + 2 * extra)
    assert sized["lower"]["saved_bytes"] == 2 * 2 * 32 * sum(SHAPES["down_proj"])


def test_where_the_plugin_is_not_told_the_ranks(base: Path, tmp_path: Path) -> None:
    """Other names: room for every slot, the empty one included, at the largest rank in all layers."""
    words = ("-a", adapter(tmp_path, "a", {"q_proj": 16}), "--device", "cpu")
    (base / "config.json").write_text(json.dumps(LLAMA_8B | {"architectures": ["OtherForCausalLM"]}))
    value = planned(base, *words)
    assert (value["plugin"], value["layout"], value["slots_bytes"]) == (True, "slots", 2 * 80 * MIB)
    assert any("not told the ranks" in note for note in value["notes"])
    assert not any("grows with --max-lora-rank" in note for note in value["notes"])


def test_the_engines_own_memory_is_what_was_measured() -> None:
    """All processes of a server, less weights and cache; the servers of `a base for each` share pages."""
    from gora_serve.capacity import CACHE, ENGINE

    result = json.loads((REPOSITORY / "benchmarks" / "results" / "deployment.json").read_text())
    weights = 134_515_008 * 2  # SmolLM2-135M in bfloat16
    for row in result["tasks"].values():
        assert row["one base"]["GB"] * 1e9 == pytest.approx(weights + CACHE + ENGINE, rel=0.03)


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("leaves", "slot", "layers"),
    [(("q_proj", "down_proj"), 2_304_000, 120), (("q_proj", "down_proj", "lm_head"), 6_475_776, 212)],
)
def test_it_is_what_vllm_allocates(tmp_path: Path, leaves: tuple[str, ...], slot: int, layers: int) -> None:
    """Bytes and buffers of vLLM 0.32's LoRA layers over SmolLM2-135M at rank 8 in bfloat16, read out of the engine."""
    from gora_serve.serving.slots import AdapterShapes, plan_slots, wrapped_layers
    from gora_serve.training.shapes import read_shapes

    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    linears, ends = read_shapes(tmp_path).linears, {"embed": (576, 49152), "lm_head": (49152, 576)}
    wrapped = wrapped_layers(linears, ends, None if "lm_head" in leaves else leaves)
    one = AdapterShapes("a", {"x": 8}, {"x": (1, 1)}, 2)
    found = plan_slots([one], wrapped, slots=4, spare=1, width=2, room=0)
    assert (found.slot_bytes, found.wrapped, found.bytes) == (slot, layers, 4 * slot)


def test_an_architecture_of_other_names_has_every_layer_and_both_ends(base: Path, tmp_path: Path) -> None:
    words = ("-a", adapter(tmp_path, "a", {"q_proj": 16}))
    (base / "config.json").write_text(json.dumps(LLAMA_8B | {"architectures": ["OtherForCausalLM"]}))
    other = planned(base, *words)
    assert other["slot_bytes"] == 80 * MIB
    assert any("wraps every layer" in note for note in other["notes"])


def test_what_serve_refuses_is_refused(base: Path, tmp_path: Path) -> None:
    folder = whole(tmp_path, "a", 8)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    answer = gora_here("plan", base, "-a", folder, "--memory", "80")
    assert (answer.code, answer.gs) == (3, "GS-383")
    assert f"gora-serve convert {folder} --base {base} --output {folder}-plain" in answer.err
    answer = gora_here("plan", base, "-a", tmp_path / "none", "--memory", "80")
    assert answer.code == 5
    good = whole(tmp_path, "good", 8)
    answer = gora_here("plan", base, "-a", f"x={good}", "-a", f"x={good}", "--memory", "80")
    assert (answer.code, answer.gs) == (2, "GS-2472")


def test_another_bases_adapter_is_told(base: Path, tmp_path: Path) -> None:
    value = planned(base, "-a", adapter(tmp_path, "a", {"99:q_proj": 8}))
    assert value["notes"] == [f"a: 1 module is not in this base, such as {path_of('q_proj', 99)}"]


def test_it_writes_nothing_and_imports_nothing_heavy(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path, "a", {"q_proj": 8})
    before = snapshot(tmp_path)
    script = """
import sys
from gora_serve.cli.main import main
assert main(["plan", sys.argv[1], "-a", sys.argv[2], "--memory", "80"]) == 0
heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy", "vllm"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(base), str(folder)], capture_output=True, text=True, timeout=TIMEOUT,
        env=environment(), check=False,
    )  # fmt: skip
    assert done.stderr == "[]\n"
    assert snapshot(tmp_path) == before
