"""Faults 58 to 68: disks, permissions, other writers. Most are the rig's and integrity's; here, the command line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from shell import command, environment, gora

from catalogue.conftest import Place, Q
from gora_serve.integrity import publishing, staging
from gora_serve.integrity.headers import encode_header


def bind_words(place: Place, *more: object) -> tuple[object, ...]:
    return ("bind", place.adapter(), "--base", place.base, "--output", place.out, *more)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_takes_no_more(place: Place, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    """59, 63: no output, nothing left, and no word that it was written."""
    words = bind_words(place)

    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", failing)
    else:
        from gora_serve import bind

        monkeypatch.setattr(bind, "_copy_files", failing)
    answer = place.refuses(words, 5, "GS-505", os.strerror(number), kept="nothing was changed")
    assert "wrote" not in answer.out + answer.err


def test_a_limit_on_the_size_of_files(place: Place) -> None:
    """59: RLIMIT_FSIZE, in a process of its own."""
    words = bind_words(place)
    place.run("--version")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512));"
        "from gora_serve.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "error[GS-505]" in done.stderr
    assert "kept: nothing was changed" in done.stderr


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_places_where_nothing_can_be(place: Place, parent: str) -> None:
    """60: a file in the place of a folder, or of the output. A missing parent is made."""
    adapter = place.adapter()
    (place.folder / "file").write_bytes(b"x")
    output = place.folder / "file" / ("out" if parent == "missing" else "")
    answer = place.run("bind", adapter, "--base", place.base, "--output", output)
    assert answer.code in (2, 5), answer.err
    assert "Traceback" not in answer.err
    assert str(place.folder / "file") in answer.err


def test_a_second_writer(place: Place) -> None:
    """61: refused within a second, by the pid of the first. That 50 races leave one whole result is the rig's."""
    words = bind_words(place)
    place.run("--version")
    with staging.staged_folder(place.out) as stage:
        begun = time.monotonic()
        answer = place.refuses(words, 6, "GS-602", f"pid {os.getpid()}", kept="nothing was changed", file=place.out)
        assert time.monotonic() - begun < 1
        assert answer.field("file") == str(place.out)
        (stage / "adapter_config.json").write_text("{}")
    place.leaves = [place.out]


def test_what_a_dead_process_left(place: Place) -> None:
    """62: its stage and its lock are swept by the next command."""
    dead = place.folder / f".{place.out.name}.gora-999999-0123abcd.tmp"
    dead.mkdir()
    (dead / "half").write_bytes(b"x")
    (place.folder / f".{place.out.name}.lock").write_text("999999\n")
    place.accepts(*bind_words_after(place))
    assert not list(place.folder.glob(f".{place.out.name}*"))
    place.before = {name: value for name, value in (place.before or {}).items() if f"/.{place.out.name}" not in name}
    place.leaves = [place.out]


def bind_words_after(place: Place) -> tuple[object, ...]:
    return bind_words(place)


@pytest.mark.parametrize("missing", [0, 1])
def test_no_room_for_the_second_copy(place: Place, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    """65: what --overwrite replaces stays until the new output is whole, so its bytes are of no help."""
    words = bind_words(place)
    place.accepts(*words)
    place.before = None
    needed = sum(path.stat().st_size for path in Path(str(words[1])).iterdir())
    free = needed + (64 << 20) - missing
    status = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1 << 40)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    if not missing:
        place.accepts(*words, "--overwrite")
        return
    answer = place.refuses((*words, "--overwrite"), 5, "GS-560", kept="nothing was changed", file=place.out)
    assert str(needed) in str(answer.field("expected"))
    assert str(free) in str(answer.field("actual"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_modes(place: Place, umask: int, mode: int) -> None:
    """66."""
    before = os.umask(umask)
    try:
        place.accepts(*bind_words(place))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in place.out.iterdir()} == {mode}
    place.leaves = [place.out]


def test_odd_surroundings(place: Place) -> None:
    """67: no UTF-8, no temporary folder, a clock at 1970: the same bytes."""
    adapter = place.adapter()
    plain = place.folder / "plain"
    place.accepts("bind", adapter, "--base", place.base, "--output", plain)
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "TMPDIR": "/no/such/folder", "SOURCE_DATE_EPOCH": "0"}
    answer = gora("bind", adapter, "--base", place.base, "--output", place.out, env=environment(**changes))
    assert answer.code == 0, answer.err
    assert contents(place.out) == contents(plain)
    place.leaves = [place.out, plain]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_system_without_exchange(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """68: the fallback; that a death between its two renames is undone is in integrity's tests."""
    words = bind_words(place)
    place.accepts(*words)
    first = contents(place.out)
    monkeypatch.setattr(publishing, "renameat2", lambda *_: False)
    place.accepts(*words, "--overwrite")
    assert contents(place.out) == first
    place.leaves = [place.out]


def test_the_words_run_in_a_process_too(place: Place) -> None:
    """That what is asserted here in this process holds in one of its own."""
    place.run("--version")
    done = subprocess.run(command("hash", place.out), env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "error[GS-520]" in done.stderr
    assert "try:" in done.stderr


TIGHT = """
import resource, sys
import converters.merging, gora_serve.cli.render_merge
from gora_serve.cli.main import main
from safetensors import safe_open
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + {room}
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    with safe_open({shard!r}, "pt") as file:
        file.get_tensor("model.embed_tokens.weight")
except (MemoryError, RuntimeError, OSError):
    print("does not fit", file=sys.stderr)
sys.exit(main(sys.argv[1:]))
"""


def test_a_shard_larger_than_memory(place: Place) -> None:
    """64: the process may take 192 MiB more than its libraries do; the shard has 320 MiB in one tensor."""
    rows = 320 * 2**20 // 64
    layout = [("model.embed_tokens.weight", "BF16", (rows, 32)), (f"{Q}.weight", "BF16", (32, 32))]
    base = place.model(encode_header(layout, {"format": "pt"}), "large")
    with base.open("r+b") as stream:
        stream.truncate(base.stat().st_size + 64 * rows + 2048)  # zeros that take no room
    adapter = place.adapter(
        {"base_model.model.model.embed_tokens.lora_embedding_A": np.full((1, rows), 0.5, np.float32),
         "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((32, 1), np.float32)},
        r=1, lora_alpha=1, target_modules=["embed_tokens"],
    )  # fmt: skip
    place.leaves = [place.out]
    place.run("--version")
    script = TIGHT.format(room=192 * 2**20, shard=str(base))
    words = ["merge", str(base.parent), "-a", str(adapter), "--from", "lora", "--output", str(place.out)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False,
        env=environment(MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="1", GORA_SERVE_CACHE=str(place.folder.parent / "cache")),
    )  # fmt: skip
    assert "does not fit" in done.stderr
    assert done.returncode == 0, done.stderr
    with (place.out / "model.safetensors").open("rb") as stream:
        stream.seek(-2048 - 64, os.SEEK_END)
        assert stream.read(66) == bytes.fromhex("003f") * 32 + b"\0\0"
