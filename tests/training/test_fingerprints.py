"""The fingerprint that an export gets, against a model with the update added to its weights, in float64."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MakeAdapter, llama_shapes
from transformers import OPTConfig, OPTForCausalLM

from gora_serve.adapter.factors import Adapter, BaseId
from gora_serve.config import ExportConfig
from gora_serve.integrity.fingerprint import Expected, read_fingerprint
from gora_serve.integrity.manifest import hash_model
from gora_serve.training import reference as module
from gora_serve.training.export import Exported, export, export_adapter
from gora_serve.training.reference import TEXTS, Reference, prompts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def adapter(make_adapter: MakeAdapter, tiny_base: Path) -> Adapter:
    shapes = llama_shapes()
    ranks = {path: 1 + index % 3 for index, path in enumerate(shapes)}
    base = BaseId(str(tiny_base), None, hash_model(tiny_base).roots)
    return make_adapter(ranks, shapes=shapes, base=base)


def fingerprint_of(done: Exported) -> tuple[Expected, ...]:
    file = done.folder / "gora_manifest.json"
    return read_fingerprint(json.loads(file.read_text()).get("canary"), file)


def merged(base: Path, adapter: Adapter | None) -> Any:
    """The base in float64, with scale * B @ A added to its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).double().eval()
    with torch.no_grad():
        for path, factors in (adapter.modules if adapter else {}).items():
            update = factors.scale * factors.B.double() @ factors.A.double()
            model.get_submodule(path).weight += update
    return model


@pytest.mark.parametrize("form", ["unit", "native", "padded"])
def test_it_says_what_the_merged_model_says(adapter: Adapter, tiny_base: Path, tmp_path: Path, form: Any) -> None:
    done = export_adapter(adapter, tmp_path / "out", ExportConfig(form))
    assert done.canary.startswith("stored")
    with torch.no_grad():
        models = merged(tiny_base, adapter), merged(tiny_base, None)
        found = fingerprint_of(done)
        assert len(found) == 3
        for one in found:
            tokens = torch.tensor([one.tokens])
            ours, theirs = (model(tokens).logits[0, -1].log_softmax(-1) for model in models)
            assert set(one.adapter) == set(ours.topk(5).indices.tolist())
            for token, value in one.adapter.items():
                assert value == pytest.approx(float(ours[token]), abs=2e-5)
                assert one.base[token] == pytest.approx(float(theirs[token]), abs=2e-5)
            assert one.effect() > 1e-3


def test_every_export_of_a_run_has_it(adapter: Adapter, tmp_path: Path) -> None:
    first = export_adapter(adapter, tmp_path / "first")
    second = export(first.folder, tmp_path / "second")
    assert fingerprint_of(first) == fingerprint_of(second) != ()


SCRIPT = """
import sys, torch
from pathlib import Path
from gora_serve.training.export import export
torch.set_num_threads(int(sys.argv[3]))
export(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_the_bytes_do_not_depend_on_process_and_threads(adapter: Adapter, tmp_path: Path) -> None:
    source = export_adapter(adapter, tmp_path / "source").folder
    for threads in ("1", "3"):
        words = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / threads), threads]
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": threads})
    one, three = ((tmp_path / threads / "gora_manifest.json").read_bytes() for threads in ("1", "3"))
    assert one == three
    assert b'"canary"' in one


def test_where_there_is_none_it_is_said_why(
    adapter: Adapter, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(name: str, adapter: Adapter, config: ExportConfig | None = None) -> str:
        done = export_adapter(adapter, tmp_path / name, config)
        assert fingerprint_of(done) == ()
        assert (done.folder / "gora_manifest.json").exists()
        return done.canary

    assert told("off", adapter, ExportConfig(canary="none")) == "none: not asked for"
    assert "no folder" in told("hub", make_adapter({"x": 2}, base=BaseId("org/base")))
    edited = shutil.copytree(tiny_base, tmp_path / "edited")
    shard = sorted(edited.glob("model-*"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    other = make_adapter({"x": 2}, base=BaseId(str(edited), None, adapter.base.roots))
    assert "not the base" in told("other", other)
    unknown = make_adapter({"no.such.module": 2}, base=adapter.base)
    assert "cannot answer" in told("unknown", unknown)
    monkeypatch.setattr(module, "AUTOMATIC", 10)
    assert "always" in told("large", adapter)
    monkeypatch.setattr(module, "free_memory", lambda _: ("cpu", 10))
    assert "memory" in told("memory", adapter, ExportConfig(canary="always"))


def test_prompts_are_cut_to_the_bases_positions_and_vocabulary(
    make_adapter: MakeAdapter, tokenizer: Any, tmp_path: Path
) -> None:
    """OPT has learned positions: one more than it has is an index out of range."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    base = tmp_path / "opt"
    OPTForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    whole = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert max(map(len, whole)) > 16
    assert max(map(max, whole)) >= 300
    for after in (1, 8):
        expected = [tuple(token for token in tokens[: 16 - after] if token < 300) for tokens in whole]
        assert prompts(base, after=after) == expected
    path = "model.decoder.layers.0.self_attn.q_proj"
    adapter = make_adapter({path: 2}, shapes={path: (16, 16)}, base=BaseId(str(base), None, hash_model(base).roots))
    done = export_adapter(adapter, tmp_path / "out")
    assert done.canary.startswith("stored")
    assert [one.tokens for one in fingerprint_of(done)] == prompts(base, 3)


def test_nothing_that_goes_wrong_stops_an_export(adapter: Adapter, tiny_base: Path, tmp_path: Path) -> None:
    """What tokenizers raises over a kind of model that it does not know is an Exception, and no kind of it."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": {"type": "none"}}))
    done = export_adapter(replace(adapter, base=BaseId(str(base), None, adapter.base.roots)), tmp_path / "out")
    assert "Exception" in done.canary
    assert fingerprint_of(done) == ()


def test_the_base_alone_and_adapters_by_name(adapter: Adapter, tiny_base: Path, tmp_path: Path) -> None:
    folder = export_adapter(adapter, tmp_path / "out", ExportConfig(canary="none")).folder
    both = Reference(tiny_base, {"a": folder, "b": folder})
    alone = Reference(tiny_base, {})
    tokens = prompts(tiny_base)[0]
    assert len(prompts(tiny_base)) == len(TEXTS)
    assert torch.equal(both.logprobs("a", tokens, 3), both.logprobs("b", tokens, 3))
    assert torch.equal(both.logprobs(None, tokens, 3), alone.logprobs(None, tokens, 3))
    assert both.logprobs("a", tokens, 3).shape[0] == 3
    assert not torch.allclose(both.logprobs("a", tokens), alone.logprobs(None, tokens))


@pytest.mark.parametrize("name", ["sql-v1.5", "train", "update", "type", "float", "items"])
def test_an_adapter_may_have_any_name(adapter: Adapter, tiny_base: Path, tmp_path: Path, name: str) -> None:
    """No name of a module may have a dot, or be what a module or a dictionary already has."""
    folder = export_adapter(adapter, tmp_path / "out", ExportConfig(canary="none")).folder
    tokens = prompts(tiny_base, 1)[0]
    named, plain = (Reference(tiny_base, {one: folder}).logprobs(one, tokens) for one in (name, "a"))
    assert torch.equal(named, plain)
