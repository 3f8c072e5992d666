"""Ids of the hub, its answers about a commit, and that no token gets out."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
from hub_server import Hub, git_sha1

from gora_serve.errors import MachineError, UsageError
from gora_serve.integrity.bases import locate_adapter, locate_base
from gora_serve.integrity.hub import HubFile, HubId, asking, is_hub_id, list_commit, parse_id, without_tokens

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("org/name@main", "org/name", "main"),
        ("org/my-model_1.5B@v1.0", "org/my-model_1.5B", "v1.0"),
        ("org/name@refs/pr/12", "org/name", "refs/pr/12"),
        (f"org/name@{COMMIT}", "org/name", COMMIT),
    ],
)
def test_ids(text: str, repo: str, revision: str | None) -> None:
    assert parse_id(text) == HubId(repo, revision)
    assert str(parse_id(text)) == text


BAD = [
    "", "@", "@main", "org/name@", "/org/name@main", "../name@main", "org/..@main", "org/../name@main", "a/b/c@main",
    "org/na..me@main", "org/name@..", "org/name@../x", "org/name@a/../b", "org/name@/etc", "org/name@a//b",
    "org/name@main/", "org/name@a b", "org/name@a?b", "org/name@a#b", "org/name@a%2f", "org/name@a\\b", "org/name@\n",
    "org/name@main@x", "org/na me@main", "org/name.git@main", "-org/name@main", "org/.name@main", "org/na--me@main",
    "org/näme@main", "org\0/name@main", "org/name@" + "a" * 256, "o" * 60 + "/" + "n" * 60 + "@main",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_id_never_reaches_the_hub(hub: Hub, text: str) -> None:
    assert not is_hub_id(text)
    with pytest.raises(UsageError, match="GS-261"):
        parse_id(text)
    with pytest.raises((UsageError, MachineError), match=r"GS-261|GS-520"):
        locate_base(text)
    with contextlib.suppress(UsageError):  # or it is a path
        assert locate_adapter(text) == Path(text)
    assert hub.asked == []


def test_a_path_without_revision_is_no_hub_adapter(hub: Hub) -> None:
    """A mistyped folder never goes out to the network."""
    assert locate_adapter("adapters/sql") == Path("adapters/sql")
    assert hub.asked == []


def test_what_the_hub_says_of_a_commit(hub: Hub) -> None:
    old = hub.add("org/name", {"config.json": b"{}"})
    new = hub.add("org/name", {"config.json": b"[]", "sub/a.safetensors": b"x" * 300})
    hub.repos["org/name"].refs["v1"] = old
    assert list_commit(HubId("org/name", "v1")) == (old, {"config.json": HubFile(2, "git-sha1", git_sha1(b"{}"))})
    commit, files = list_commit(HubId("org/name"))
    assert commit == new
    assert files["sub/a.safetensors"].algorithm == "sha256"
    assert files["sub/a.safetensors"].size == 300
    assert not hub.requests("GET", "/resolve/")


@pytest.mark.parametrize(
    ("which", "way_out"),
    [("nobody/nothing@main", "check the spelling"), ("org/name@gone", "the repository is there")],
)
def test_what_is_not_there(hub: Hub, which: str, way_out: str) -> None:
    hub.add("org/name", {"config.json": b"{}"})
    with pytest.raises(MachineError, match="GS-551") as caught:
        list_commit(parse_id(which))
    assert way_out in str(caught.value.fields["try"])
    assert caught.value.fields["file"] == which


def test_an_answer_with_paths_that_leave_the_repository_is_refused(hub: Hub) -> None:
    hub.add("org/name", {"../x.json": b"{}"})
    with pytest.raises(MachineError, match="GS-551"):
        list_commit(HubId("org/name"))


@pytest.mark.parametrize(
    "text",
    [f"a {TOKEN} b", f"Authorization: Bearer {TOKEN}", "Bearer abc.def-ghi_jkl", "x secret-of-mine y", "the-login z"],
)
def test_tokens_are_taken_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("the-login\n")
    told = without_tokens(text)
    assert "<token>" in told
    assert not any(secret in told for secret in (TOKEN, "abc.def", "secret-of-mine", "the-login"))


def test_other_text_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    text = "hf_hub_download in file_download.py, hf_raise_for_status, gb1:sha256:" + "0" * 64
    assert without_tokens(text) == text


def test_errors_of_any_kind_become_ours_without_tokens(hub: Hub) -> None:
    with pytest.raises(MachineError, match="GS-551") as caught, asking("it broke", code="GS-551", file="x", hint="so"):
        raise RuntimeError(f"a library of its own says {TOKEN}")
    assert TOKEN not in str(caught.value)
    assert (caught.value.fields["try"], caught.value.exit_code) == ("so", 5)


def test_the_library_logs_no_token(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    stream = logging.StreamHandler()
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(stream)
    try:
        with asking("x", code="GS-551", file="x"):
            logging.getLogger("huggingface_hub.x").warning("the server says %s", TOKEN)
    finally:
        logger.removeHandler(stream)
    told = capfd.readouterr().err
    assert "the server says <token>" in told
    assert TOKEN not in told
