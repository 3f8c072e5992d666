"""Faults 77 to 88: what the server is started with, and what it must not be. No engine runs here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving.test_engine import make_plan
from shell import fit_words

from catalogue.conftest import WEIGHTS, Place, Q, factors
from gora_serve.bind import bind
from gora_serve.errors import MismatchError
from gora_serve.integrity import advisories
from gora_serve.integrity.layout import INDEX
from gora_serve.integrity.reading import stamps
from gora_serve.serving.engine import child_environment, running_server
from gora_serve.serving.plan import ServePlan
from gora_serve.serving.process import session_members
from gora_serve.serving.start import prepare

KEY = "a-secret-key-0123456789"


@pytest.fixture
def bound(place: Place) -> Path:
    bind(place.adapter(), str(place.base), place.folder / "bound")
    return place.folder / "bound"


def test_a_port_that_is_taken(place: Place, bound: Path) -> None:
    """77: in less than two seconds of this process's time, before an engine starts."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        begun = time.process_time()
        words = ("serve", place.base, "-a", f"a={bound}", "--port", port)
        place.refuses(words, 5, "GS-581", f"127.0.0.1:{port}", "--port")
        assert time.process_time() - begun < 2


def test_a_host_that_is_not_here(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """77: an address of no interface of this machine (RFC 5737)."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    place.refuses(("serve", place.base, "--host", "192.0.2.1"), 5, "GS-581", "192.0.2.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_open_server_without_a_key(place: Place, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """78."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    place.refuses(place.serve(more=("--host", host)), 2, "GS-283", host, "VLLM_API_KEY")


def test_an_adapter_that_is_swapped_after_it_was_verified(place: Place, bound: Path, tmp_path: Path) -> None:
    """80: the engine gets the copy in the store, whose bytes are those that were verified, whatever comes after."""
    verified = (bound / WEIGHTS).read_bytes()
    plan, _ = prepare(str(place.base), [("a", bound)], replace(replace_config(), store=tmp_path / "store"))
    place.run("--version")
    (bound / WEIGHTS).rename(bound / "aside")
    (bound / WEIGHTS).write_bytes(b"something else")
    (served,) = plan.adapters
    with running_server(without_adapters(plan), log=tmp_path / "log"):  # the stamps hold
        assert f'"path": "{served.path}"' in " ".join(plan.argv)
        assert (served.path / WEIGHTS).read_bytes() == verified
        assert (served.path / WEIGHTS).stat().st_nlink == 1
    (bound / "aside").replace(bound / WEIGHTS)


@pytest.mark.parametrize("what", ["store", "base", "index", "tokenizer"])
def test_a_file_that_is_swapped_after_it_was_verified(place: Place, bound: Path, what: str, tmp_path: Path) -> None:
    """80: what the engine has read is what was verified, or it is ended: by size, times and inode of every file."""
    plan, _ = prepare(str(place.base), [("a", bound)], replace(replace_config(), store=tmp_path / "store"))
    named = {"index": INDEX, "tokenizer": "tokenizer.json"}
    of_base = place.base / named[what] if what in named else sorted(place.base.glob("model-*"))[0]
    file = plan.adapters[0].path / WEIGHTS if what == "store" else of_base
    assert file.resolve() in {path.resolve() for path in plan.stamps}
    place.run("--version")
    whole = file.read_bytes()
    file.parent.chmod(0o700)
    other = file.with_name("swapped")
    other.write_bytes(whole)
    other.replace(file)
    stand_in = without_adapters(plan)
    with (
        pytest.raises(MismatchError, match="GS-101") as caught,
        running_server(stand_in, log=tmp_path / "log") as server,
    ):
        assert session_members(server.pid) == ()
    assert Path(str(caught.value.fields["file"])).name == file.name
    assert caught.value.exit_code == 1
    assert "try" in caught.value.fields


def test_weights_that_come_after_the_base_was_verified(place: Place, bound: Path, tmp_path: Path) -> None:
    """80: an engine that may have read them is ended; those that lay there before, and that an index keeps out, are not
    new."""
    shutil.copy(place.base / "model-00001-of-00002.safetensors", place.base / "old.safetensors")
    plan, _ = prepare(str(place.base), [("a", bound)], replace(replace_config(), store=tmp_path / "store"))
    place.run("--version")
    with running_server(without_adapters(plan), log=tmp_path / "log"):
        pass
    new = place.base / "consolidated.safetensors"
    shutil.copy(place.base / "old.safetensors", new)
    with (
        pytest.raises(MismatchError, match="GS-101") as caught,
        running_server(without_adapters(plan), log=tmp_path / "log") as server,
    ):
        assert session_members(server.pid) == ()
    assert caught.value.fields["file"] == new
    new.unlink()


def test_files_that_stand_are_served(place: Place, bound: Path, tmp_path: Path) -> None:
    """80, the other way round."""
    place.run("--version")
    files = [path for path in bound.iterdir() if path.is_file()]
    with running_server(replace(make_plan(), stamps=stamps(files)), log=tmp_path / "log"):
        pass


def without_adapters(plan: ServePlan) -> ServePlan:
    """The stand-in for the engine, with what the plan says of files: it has no adapters to ask."""
    return replace(make_plan(), stamps=plan.stamps, base=plan.base, beside=plan.beside)


def replace_config() -> Any:
    from gora_serve.config import ServeConfig

    return ServeConfig(device="cpu")


OPENED = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_LORA_RESOLVER_CACHE_DIR": "/tmp",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST": "org/x", "VLLM_PLUGINS": "lora_filesystem_resolver",
}  # fmt: skip


def test_no_name_leads_to_a_file(place: Place, bound: Path) -> None:
    """81: an unknown model is a file for vLLM's resolvers and its runtime loading alone; the engine gets neither.

    That the real engine answers 404 is in the end-to-end tests.
    """
    told = json.loads(place.accepts(*place.serve(bound, more=("--json",))).out)
    plan = ServePlan((), told["environment"], tuple(told["removed"]), place.base, (), "")
    environment = child_environment(plan, OPENED)
    assert environment == told["environment"]
    assert environment["VLLM_PLUGINS"] == "gora_serve"  # ours alone; where it is missing, vLLM loads all


def test_the_key_is_nowhere(place: Place, bound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """83: not in the command line, the plan, or what is printed."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    for more in (("--json",), ()):
        answer = place.accepts(*place.serve(bound, more=("--host", "0.0.0.0", *more)))
        assert KEY not in answer.out + answer.err
    answer = place.refuses(place.serve(bound, more=("--host", "0.0.0.0", "--", "--api-key", KEY)), 2, "GS-284")
    assert KEY not in answer.out + answer.err


@pytest.mark.parametrize(
    ("more", "expected"),
    [(("--max-lora-rank", "1"), "--max-lora-rank >= 2"), (("--max-loras", "1"), "--max-loras >= 2")],
)
def test_too_small_for_the_adapters(place: Place, bound: Path, more: tuple[str, ...], expected: str) -> None:
    """84: the options are wrong, so that the exit status is 2."""
    place.refuses(place.serve(bound, more=("--", *more)), 2, "GS-285", expected=expected)


def test_a_rank_that_no_engine_has(place: Place) -> None:
    """84."""
    folder = place.adapter(factors(rank=513), r=513)
    place.refuses(place.serve(folder), 3, "GS-387", Q, file=folder / WEIGHTS)


def test_versions_with_advisories(place: Place, bound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """85: serve warns with the ids, --strict refuses."""
    monkeypatch.setattr(advisories, "installed_versions", lambda names: dict.fromkeys(names, "0.9.0"))
    words = place.serve(bound)
    answer = place.accepts(*words)
    assert "warning: " in answer.err
    assert "CVE-" in answer.err
    place.refuses((*words, "--strict"), 5, "GS-571", "CVE-")


CODE = {
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
    "internal": {"_attn_implementation_internal": "org/kernels"},
    "nested": {"text_config": {"auto_map": {"AutoConfig": "org/repo--configuration_x.X"}}},
}


@pytest.mark.parametrize("what", CODE)
def test_a_base_that_asks_for_code(place: Place, tiny_data: Path, what: str) -> None:
    """86: by every command that loads or serves it; serve takes it where it is trusted in so many words."""
    file = place.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CODE[what]))
    (place.base / "modeling_x.py").write_text(f"open({str(place.folder / 'canary')!r}, 'w')\n")
    adapter = place.adapter()
    place.leaves = [place.folder / "out.partial"]
    commands = [
        place.serve(adapter),
        fit_words(place.base, tiny_data, place.out),
        ("probe", place.base, "--data", tiny_data, "--output", place.out, "--probe-steps", "2"),
        ("gap", adapter, "--base", place.base, "--data", tiny_data, "--max-length", "128"),
    ]
    for words in commands:
        place.refuses(tuple(words), 3, "GS-338", "trust", file=file)
    place.accepts(*place.serve(adapter, more=("--", "--trust-remote-code")))


def test_an_environment_that_opens_the_server(place: Place, bound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """87: taken away, and said."""
    for name, value in OPENED.items():
        monkeypatch.setenv(name, value)
    answer = place.accepts(*place.serve(bound, more=("--json",)))
    told = json.loads(answer.out)
    for name in set(OPENED) - {"VLLM_PLUGINS"}:
        assert f"warning: {name} is set, and taken away from the engine" in answer.err
        assert name not in told["environment"]
    plan = ServePlan((), told["environment"], tuple(told["removed"]), place.base, (), "")
    assert not set(OPENED) - {"VLLM_PLUGINS"} & set(child_environment(plan, os.environ)) - set(OPENED)


def test_no_network(
    place: Place, tiny_data: Path, bound: Path, events: Callable[..., list[tuple[object, ...]]]
) -> None:
    """88: no command on local files looks up a name or connects."""
    place.leaves = [place.out, place.folder / "run", place.folder / "exported"]
    for words in (
        ("hash", place.base), ("plan", place.base), place.serve(bound), ("verify", bound, "--base", place.base),
        ("export", bound, "--output", place.folder / "exported"), ("gap", bound, "--base", place.base),
        ("convert", bound, "--base", place.base, "--output", place.out),
        fit_words(place.base, tiny_data, place.folder / "run"),
    ):  # fmt: skip
        place.accepts(*words)
    assert events("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") == []
