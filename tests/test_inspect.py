"""`inspect`: what headers and JSON files say, against torch's own count; nothing is hashed, and torch stays out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import build_llama

from gora_serve.bind import bind
from gora_serve.integrity.manifest import hash_model

sys.path.insert(0, str(Path(__file__).parent / "cli"))
from shell import SMALL, environment, gora_here, snapshot

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapter: ranks 2 and 6, rsLoRA."""
    return saved(tmp_path_factory.mktemp("inspect") / "foreign", use_rslora=True, rank_pattern={"up_proj": 6})


def saved(folder: Path, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], **settings)
    get_peft_model(build_llama(), config).save_pretrained(folder)
    return folder


def told(*words: object) -> dict[str, Any]:
    answer = gora_here("inspect", *words, "--json")
    assert answer.code == 0, answer.err
    value: dict[str, Any] = json.loads(answer.out)
    return value


def test_an_adapter_of_another_tool(foreign: Path) -> None:
    value, tensors = told(foreign), load_file(foreign / WEIGHTS)
    assert value["kind"] == "adapter"
    assert value["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert value["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert value["modules"]["model.layers.1.mlp.up_proj"] == {"rank": 6, "scale": 4 / 6**0.5, "shape": [64, 32]}
    assert value["modules"]["model.layers.0.self_attn.q_proj"] == {"rank": 2, "scale": 4 / 2**0.5, "shape": [32, 32]}
    assert (value["largest_rank"], value["max_lora_rank"], value["other_tensors"]) == (6, 8, 0)
    assert value["slot_fill"] == pytest.approx((6 * 96 + 2 * 64) / (8 * (96 + 64)))
    assert (value["base"]["weights_root"], value["base"]["claim"], value["sealed"]) == (None, None, False)
    shown = gora_here("inspect", foreign).out
    for words in (
        "ranks up to 6; vLLM: --max-lora-rank 8, 55% of its slot is used",
        "not bound",
        "mlp.up_proj",
        "2.828",
    ):
        assert words in shown


def test_a_bound_adapter_says_to_what(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    bind(foreign, str(tiny_base), tmp_path / "bound")
    value = told(tmp_path / "bound")
    assert value["sealed"]
    assert value["base"]["weights_root"] == hash_model(tiny_base).roots.weights
    assert value["base"]["claim"] == "asserted"
    assert value["modules"] == told(foreign)["modules"]


def test_a_converted_adapter(tmp_path: Path, tiny_base: Path) -> None:
    adapter = saved(tmp_path / "olora", init_lora_weights="olora")
    file = adapter / WEIGHTS
    from safetensors.torch import save_file

    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert gora_here("convert", adapter, "--base", tiny_base, "--output", tmp_path / "out").code == 0
    value = told(tmp_path / "out")
    assert value["converted_from"] == "olora"
    assert {module["scale"] for module in value["modules"].values()} == {1.0}
    assert told(adapter)["initialization"] == "olora"


def test_an_adapter_that_is_no_plain_lora(tmp_path: Path) -> None:
    from peft import LoHaConfig, get_peft_model

    get_peft_model(build_llama(), LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
    value = told(tmp_path / "loha")
    assert (value["type"], value["modules"], value["max_lora_rank"]) == ("LOHA", {}, None)
    assert "gora-serve convert reads it" in value["notes"][0]


def test_a_rank_that_the_configuration_denies(foreign: Path, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))
    value = told(adapter)
    assert {module["scale"] for module in value["modules"].values()} == {None}
    assert "the scales are not known" in value["notes"][0]


def test_a_base(tiny_base: Path) -> None:
    value, model = told(tiny_base), build_llama()
    assert (value["kind"], value["type"], value["layers"]) == ("base", "llama", 2)
    assert value["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert value["files"] == len(list(tiny_base.glob("*.safetensors")))
    assert value["dtypes"] == {"F32": value["tensors"]}


def test_a_merged_model(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "merged")
    base = {"repo_id": "org/base", "revision": None, "weights_root": "gb1:sha256:00"}
    adapters = [{"adapter": "runs/x", "weight": 0.5, "family": "pissa", "files": {}}]
    receipt = {"schema": "gora-serve/merge/1", "base": base, "adapters": adapters, "weights_root": "gb1:sha256:11"}
    (tmp_path / "merged" / "merge.json").write_text(json.dumps(receipt))
    value = told(tmp_path / "merged")
    assert value["kind"] == "merged model"
    assert value["adapters"] == [{"adapter": "runs/x", "weight": 0.5, "family": "pissa"}]
    assert "with runs/x (pissa), weight 0.5" in gora_here("inspect", tmp_path / "merged").out


@pytest.mark.parametrize("odd", [5, True, None, "x", [1], [None], {"a": 1}])
def test_values_of_another_kind(tmp_path: Path, odd: object) -> None:
    """What lies in a model's files says little then, and is shown all the same."""
    build_llama().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": odd}))
    assert "1 weight file\n" in gora_here("inspect", tmp_path / "model").out
    (tmp_path / "model" / "merge.json").write_text(json.dumps({"adapters": odd, "base": odd}))
    value = told(tmp_path / "model")
    assert (value["kind"], value["adapters"]) == ("merged model", [])
    assert gora_here("inspect", tmp_path / "model").code == 0


def test_a_run(tmp_path: Path, tiny_base: Path, tiny_data: Path) -> None:
    words = ("fit", tiny_base, "--data", tiny_data, "--output", tmp_path / "run", "--steps", "1", *SMALL)
    assert gora_here(*words).code == 0
    value = told(tmp_path / "run")
    assert (value["kind"], value["status"], value["method"]) == ("run", "complete", "gora")
    ranks = json.loads((tmp_path / "run" / "ranks.json").read_text())["ranks"]
    found = {path: module["rank"] for path, module in value["adapter"]["modules"].items()}
    assert found == {path: rank for path, rank in ranks.items() if rank}
    assert value["adapter"]["base"]["weights_root"] == hash_model(tiny_base).roots.weights
    shown = gora_here("inspect", tmp_path / "run")
    assert "complete, method gora" in shown.out
    assert "bound (trained) to" in shown.out
    (tmp_path / "run" / "run.json").write_text("{}")
    assert told(tmp_path / "run")["status"] is None


WRITER = """
import sys, time
from pathlib import Path
from gora_serve.integrity.staging import staged_folder
with staged_folder(Path(sys.argv[1]), visible=True) as stage:
    (stage / "run.json").write_text(sys.argv[2])
    for step in (4, 10):
        (stage / "checkpoints" / f"step-{step}").mkdir(parents=True)
    print("there", flush=True)
    time.sleep(600)
"""


def test_a_probe(tmp_path: Path, tiny_base: Path, tiny_data: Path) -> None:
    words = ("--data", tiny_data, "--output", tmp_path / "probe", "--probe-steps", "2", "--batch-size", "4")
    answer = gora_here("probe", tiny_base, *words, "--max-length", "128")
    assert answer.code == 0, answer.err
    value = told(tmp_path / "probe")
    asked = ("kind", "mode", "metric", "steps", "samples", "stopped_early")
    assert [value[name] for name in asked] == ["probe", "exact", "sensitivity", 2, 8, False]
    assert (value["base"]["name"], value["data"]["name"]) == (str(tiny_base), tiny_data.name)
    ranks = json.loads(gora_here("ranks", tmp_path / "probe", "--json").out)["ranks"]
    assert value["targets"] == len(ranks)
    shown = gora_here("inspect", tmp_path / "probe").out
    for words in (f"exact gradients of {len(ranks)} modules", "2 steps, 8 rows", "next: gora-serve ranks "):
        assert words in shown


def test_an_unfinished_run_and_one_that_was_killed(tmp_path: Path) -> None:
    """Another process holds the run, then dies by SIGKILL. 50 rows, 4 a step: 13 steps."""
    config = {"train": {"method": "gora", "epochs": None, "grad_accum": 2}, "data": {"batch_size": 2}}
    text = json.dumps({"status": "running", "config": config, "data": {"used": 50}, "processes": 1})
    words = [sys.executable, "-c", WRITER, str(tmp_path / "run"), text]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment()) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"there\n"
        value, shown = told(tmp_path / "run.partial"), gora_here("inspect", tmp_path / "run.partial").out
        writer.kill()
    assert (value["status"], value["step"], value["steps"]) == ("running", 10, 13)
    assert "running, method gora" in shown
    assert "step 10 of 13; checkpoints: step-4, step-10" in shown
    before = snapshot(tmp_path)
    assert told(tmp_path / "run.partial")["status"] == "interrupted"
    shown = gora_here("inspect", tmp_path / "run.partial").out
    assert "interrupted: no process holds it; fit --resume goes on" in shown
    (tmp_path / ".run.lock").unlink()
    assert told(tmp_path / "run.partial")["status"] == "interrupted"
    assert snapshot(tmp_path) == {path: held for path, held in before.items() if not path.endswith(".lock")}


@pytest.mark.parametrize("odd", [5, None, "x", [1], {"a": 1}, 0])
def test_a_run_with_values_of_another_kind(tmp_path: Path, odd: object) -> None:
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    for value in (
        {"config": odd, "data": odd, "processes": odd},
        {"config": {"train": {"steps": odd, "epochs": odd, "grad_accum": odd}, "data": {"batch_size": odd}},
         "data": {"used": odd}, "processes": odd},
    ):  # fmt: skip
        (tmp_path / "run.json").write_text(json.dumps(value))
        assert told(tmp_path)["step"] == 4
        assert "checkpoints: step-4" in gora_here("inspect", tmp_path).out


def test_what_is_none_of_them(tmp_path: Path) -> None:
    for folder, gs in ((tmp_path, "GS-3197"), (tmp_path / "none", "GS-503")):
        answer = gora_here("inspect", folder)
        assert (answer.gs, answer.out) == (gs, "")


def test_torch_is_not_imported(foreign: Path, tiny_base: Path) -> None:
    script = (
        "import sys; from gora_serve.cli.main import main; code = main(['inspect', sys.argv[1]]);"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), code)"
    )
    for path in (foreign, tiny_base):
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=environment(), check=True
        )
        assert done.stdout.splitlines()[-1] == "[] 0"
