"""Files and folders appear whole or not at all: refusals, failures at every step, kills, two writers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gora_serve.cli.stopping import stopping
from gora_serve.errors import GoraError, MachineError, OutputError, UsageError
from gora_serve.integrity import publishing
from gora_serve.integrity.files import sha256_file, staged_folder, write_bytes, write_json, write_stream, write_text
from gora_serve.integrity.staging import SEAL
from gora_serve.integrity.targets import SEAL_SCHEMA
from gora_serve.signals import came, leave, leaving_on_signals


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_text(written(name, text))


def written(name: str, text: str) -> str:
    """What a file holds: its text, or the seal that lists the others."""
    seal = {"schema": SEAL_SCHEMA, "files": {one: {} for one in FILES[:3]}, "made": text}
    return json.dumps(seal) if name == SEAL else text


FILES = ("a", "b", "sub/c", SEAL)
OLD, NEW = ({name: written(name, text) for name in FILES} for text in ("old", "new"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    fill(folder, "old")
    return folder


def test_sha256_file_agrees_with_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(3_000_001))
    listed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert sha256_file(path) == (3_000_001, listed.split()[0])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "x", b"1")
        with staged_folder(tmp_path / "out") as stage:
            write_bytes(stage / "y", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode
    assert (tmp_path / "out" / "y").stat().st_mode & 0o777 == mode
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert names(tmp_path) == ["out", "x"]


def test_write_json_keeps_order_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"b": float("nan")})
    assert path.read_text(encoding="utf-8").startswith('{\n  "b"')


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path if call == "replace" else os, call, fail)
    with pytest.raises(MachineError, match="No space left"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert (names(tmp_path), path.read_text()) == (["x"], "old")


def test_publishes_a_new_folder_and_makes_its_parents(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "p" / "q" / "out") as stage:
        fill(stage, "new")
        assert not (tmp_path / "p" / "q" / "out").exists()
    assert content(tmp_path / "p" / "q" / "out") == NEW
    assert names(tmp_path / "p" / "q") == ["out"]


def test_an_existing_folder_is_refused_or_replaced(old: Path) -> None:
    with pytest.raises(OutputError, match="GS-601"), staged_folder(old):
        pytest.fail("the body must not run")
    assert content(old) == OLD
    with staged_folder(old, overwrite=True) as stage:
        (stage / "z").write_text("new")
        assert content(old) == OLD
    assert content(old) == {"z": "new"}
    assert names(old.parent) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def body() -> None:
        with staged_folder(target) as stage:
            fill(stage, "new")
            target.mkdir()
            fill(target, "old")

    with pytest.raises(OutputError, match="GS-601"):
        body()
    assert content(target) == OLD
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("visible", [False, True])
def test_a_failing_body_leaves_the_old_folder(old: Path, visible: bool) -> None:
    def body() -> None:
        with staged_folder(old, overwrite=True, visible=visible) as stage:
            fill(stage, "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert content(old) == OLD
    assert names(old.parent) == (["out", "out.partial"] if visible else ["out"])


def test_a_visible_stage_is_kept_refused_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "run"

    def body() -> None:
        with staged_folder(target, visible=True) as stage:
            fill(stage, "old")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MachineError, match=r"unfinished output is in .*run\.partial"):
        body()
    assert content(tmp_path / "run.partial") == OLD
    with pytest.raises(OutputError, match="GS-603"), staged_folder(target, visible=True):
        pass
    with staged_folder(target, visible=True, overwrite=True) as stage:
        assert stage == tmp_path / "run.partial"
        (stage / "z").write_text("new")
    assert (names(tmp_path), content(target)) == (["run"], {"z": "new"})


@pytest.mark.parametrize("place", [".", "..", "inside/out", "link", "link/out"])
def test_inputs_are_protected(tmp_path: Path, place: str) -> None:
    base = tmp_path / "p" / "base"
    base.mkdir(parents=True)
    (base / "w").write_text("w")
    (tmp_path / "p" / "other").symlink_to(base)
    target = base / place if not place.startswith("link") else tmp_path / "p" / place.replace("link", "other")
    target = Path(os.path.normpath(target))
    with pytest.raises(UsageError, match=r"GS-25[12]"), staged_folder(target, overwrite=True, protect=[base]):
        pytest.fail("the body must not run")
    assert (names(base), names(tmp_path / "p")) == (["w"], ["base", "other"])


def test_odd_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for target, error, code in [
        (tmp_path / "file", UsageError, "GS-253"),
        (tmp_path / "file" / "out", MachineError, "GS-505"),
        (tmp_path / "dangling", UsageError, "GS-252"),
        (tmp_path / "cwd" / "..", UsageError, "GS-255"),
        (Path("/"), UsageError, "GS-255"),
        (Path(), UsageError, "GS-254"),
        (tmp_path, UsageError, "GS-254"),
    ]:
        with pytest.raises(error, match=code), staged_folder(target, overwrite=True):
            pytest.fail("the body must not run")
    assert names(tmp_path) == ["cwd", "dangling", "file"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_text("x")
    with pytest.raises(UsageError, match="GS-257"), staged_folder(tmp_path / "photos", overwrite=True):
        pytest.fail("the body must not run")
    assert content(tmp_path) == {"photos/x.jpg": "x"}
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty", overwrite=True) as stage:
        fill(stage, "new")
    assert content(tmp_path / "empty") == NEW


def test_a_neighbour_is_not_protected(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with staged_folder(tmp_path / "base-2", protect=[tmp_path / "base", tmp_path / "none"]) as stage:
        fill(stage, "new")
    assert content(tmp_path / "base-2") == NEW


@pytest.mark.parametrize("overwrite", [False, True])
def test_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    monkeypatch.setattr(publishing, "renameat2", lambda *_: False)
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / SEAL).write_text(written(SEAL, "old"))
    with staged_folder(target, overwrite=overwrite) as stage:
        fill(stage, "new")
    assert (names(tmp_path), content(target)) == (["out"], NEW)


def test_a_death_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    aside = tmp_path / ".out.gora-1-0123abcd.old"
    aside.mkdir()
    fill(aside, "old")
    (tmp_path / ".out.gora-1-0123abcd.tmp").mkdir()
    kept = tmp_path / ".out.gora-x.gora-1-0123abcd.tmp"  # the stage of a target named out.gora-x
    kept.mkdir()
    with pytest.raises(OutputError, match="GS-601"), staged_folder(tmp_path / "out"):
        pass
    assert content(tmp_path / "out") == OLD
    assert names(tmp_path) == [kept.name, "out"]


CALLS = ["mkdir", "open", "fsync", "rename", "replace", "renameat2"]


class Failing:
    """A stand-in for a call, which fails with `number` when it is called for the `when`-th time."""

    def __init__(self, real: Callable[..., object], when: int, number: int) -> None:
        self.real, self.left, self.number = real, when, number

    def __call__(self, *args: object, **options: object) -> object:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **options)


def outcome(target: Path, overwrite: bool) -> str:
    try:
        with staged_folder(target, overwrite=overwrite) as stage:
            fill(stage, "new")
    except GoraError as err:
        return err.code
    return "published"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_every_failing_call_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, exists: bool, number: int
) -> None:
    target = tmp_path / "out"
    owner, name = (publishing, "renameat2") if call == "renameat2" else (os, call)
    for when in range(1, 60):
        shutil.rmtree(target, ignore_errors=True)
        if exists:
            target.mkdir()
            fill(target, "old")
        failing = Failing(getattr(owner, name), when, number)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            code = outcome(target, overwrite=exists)
        if code in ("GS-505", "GS-502"):  # GS-502: the old folder's seal was not read
            assert (content(target) == OLD) if exists else not target.exists()
            assert set(names(tmp_path)) <= {"out"}
        else:
            assert code in ("GS-506", "published")
            assert content(target) == NEW
        if failing.left > 0:  # the call was made fewer than `when` times
            assert set(names(tmp_path)) == {"out"}
            return
    pytest.fail("the calls did not come to an end")


CHILD = """
import sys, time
from pathlib import Path
from gora_serve.integrity.files import staged_folder, write_text
target, text, stop, seal = Path(sys.argv[1]), *sys.argv[2:5]
try:
    with staged_folder(target, overwrite=True) as stage:
        print("in", flush=True)
        for name in ("a", "b", "gora_manifest.json"):
            write_text(stage / name, seal if name == "gora_manifest.json" else text)
        if stop == "hang":
            print("ready", flush=True)
            time.sleep(60)
        (stage / "sub").mkdir()
        write_text(stage / "sub" / "c", text)
        if stop == "hold":
            time.sleep(0.05)
except Exception as err:
    print(err, flush=True)
    sys.exit(getattr(err, "exit_code", 70))
"""


def child(target: Path, text: str, stop: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(target), text, stop, written(SEAL, text)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_a_kill_in_the_body_leaves_the_old_and_the_next_run_sweeps(old: Path) -> None:
    with child(old, "new", "hang") as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["in\n", "ready\n"]
        with pytest.raises(OutputError, match=f"GS-602.*pid {process.pid}"), staged_folder(old, overwrite=True):
            pass
        process.send_signal(signal.SIGKILL)
    assert content(old) == OLD
    assert any(name.endswith(".tmp") for name in names(old.parent))
    with staged_folder(old, overwrite=True) as stage:
        fill(stage, "new")
    assert (names(old.parent), content(old)) == (["out"], NEW)


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_any_moment_leaves_old_or_new(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "out"
    for i in range(12):
        shutil.rmtree(target, ignore_errors=True)
        if exists:
            target.mkdir()
            fill(target, "old")
        with child(target, "new", "go") as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(i * 0.0008)
            process.send_signal(signal.SIGKILL)
        found = content(target) if target.exists() else None
        assert found in (NEW, OLD if exists else None)


def test_of_two_writers_each_result_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for _ in range(6):
        processes = [child(target, text, "hold") for text in ("old", "new")]
        statuses = []
        for process in processes:
            process.communicate(timeout=30)
            statuses.append(process.returncode)
        assert 0 in statuses
        assert set(statuses) <= {0, 6}
        assert content(target) in (OLD, NEW)
    assert names(tmp_path) == ["out"]


def test_the_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as stage:
        fill(stage, "new")
        with pytest.raises(OutputError, match=f"pid {os.getpid()}"), staged_folder(tmp_path / "out"):
            pytest.fail("the body must not run")
    assert content(tmp_path / "out") == NEW


def test_a_partial_folder_is_gone_on_with(tmp_path: Path) -> None:
    """What a killed process was writing is swept, what it had finished stays."""
    partial = tmp_path / "out.partial"
    (partial / "inner").mkdir(parents=True)
    (partial / "done").write_text("kept")
    for name in (".gora-7-0123abcd.tmp", "inner/.gora-7-0123abcd.tmp", "inner/.step-1.lock"):
        (partial / name).write_text("torn")
    torn = partial / "inner" / ".step-1.gora-7-0123abcd.tmp"
    torn.mkdir()
    (torn / "file").write_text("torn")
    with staged_folder(tmp_path / "out", visible=True, resume=True) as again:
        assert again == partial
        found = sorted(path.relative_to(again).as_posix() for path in again.rglob("*"))
        assert found == ["done", "inner"]
    assert (tmp_path / "out" / "done").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
def test_a_partial_folder_of_others_is_not_taken(tmp_path: Path, how: dict[str, bool]) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("mine")
    with (
        pytest.raises(OutputError, match="GS-604") as caught,
        staged_folder(tmp_path / "out", visible=True, mark="first", **how),
    ):
        pytest.fail("the body must not run")
    assert caught.value.fields["file"] == partial
    assert "thesis.tex" in str(caught.value.fields["actual"])
    assert content(tmp_path) == {"out.partial/thesis.tex": "mine"}


def test_a_partial_folder_of_a_writer_killed_before_its_first_file(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".gora-7-0123abcd.tmp").write_text("torn")
    with staged_folder(tmp_path / "out", visible=True, resume=True, mark="first") as stage:
        (stage / "first").write_text("1")
    assert content(tmp_path) == {"out/first": "1"}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
def test_a_partial_folder_that_is_a_file(tmp_path: Path, how: dict[str, bool]) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(UsageError, match="GS-253") as caught, staged_folder(tmp_path / "out", visible=True, **how):
        pytest.fail("the body must not run")
    assert caught.value.fields["file"] == tmp_path / "out.partial"
    assert content(tmp_path) == {"out.partial": "mine"}


def test_a_partial_folder_half_deleted_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death while --overwrite deletes the old partial leaves nothing that stands in the way of the next run."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name in ("first", "second"):
        (partial / name).write_text("old")

    def dying(folder: Path, **_: bool) -> None:
        (Path(folder) / "first").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dying)
        with (
            pytest.raises(KeyboardInterrupt),
            staged_folder(tmp_path / "out", visible=True, overwrite=True, mark="first"),
        ):
            pytest.fail("the body must not run")
    with staged_folder(tmp_path / "out", visible=True, resume=True, mark="first") as stage:
        (stage / "first").write_text("new")
    assert content(tmp_path) == {"out/first": "new"}


def test_a_failed_write_in_a_visible_stage_names_the_stage(tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match="GS-505") as caught,
        staged_folder(tmp_path / "out", visible=True) as stage,
    ):
        write_bytes(stage / "missing" / "file", b"1")
    kept = str(caught.value.fields["kept"])
    assert str(tmp_path / "out.partial") in kept
    assert "--resume" in kept


def test_a_lock_that_cannot_be_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.unlink

    def unlink(path: str | Path, **options: int) -> None:
        if str(path).endswith(".lock"):
            raise OSError(errno.EIO, "Input/output error")
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with staged_folder(tmp_path / "out") as stage:
            fill(stage, "new")
    assert content(tmp_path / "out") == NEW
    assert "delete it" in caplog.text
    with staged_folder(tmp_path / "out", overwrite=True) as stage:
        fill(stage, "new")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_lock_that_cannot_be_signed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(os, call, Failing(getattr(os, call), 1, errno.ENOSPC))
    with pytest.raises(MachineError, match="GS-505"), staged_folder(tmp_path / "out"):
        pytest.fail("the body must not run")
    assert names(tmp_path) == []


def test_what_a_killed_writer_of_a_file_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".ranks.json.gora-7-0123abcd.tmp"
    others = [tmp_path / name for name in (".gora-7-0123abcd.tmp", ".probe.json.gora-7-0123abcd.tmp")]
    for path in (left, *others):
        path.write_text("torn")
    write_bytes(tmp_path / "ranks.json", b"{}")
    assert names(tmp_path) == sorted(["ranks.json", *(path.name for path in others)])


def test_the_temporary_of_a_living_writer_is_left(tmp_path: Path) -> None:
    with write_stream(tmp_path / "file") as slow:
        slow.write(b"slow")
        write_bytes(tmp_path / "file", b"quick")
        assert (tmp_path / "file").read_bytes() == b"quick"
    assert content(tmp_path) == {"file": "slow"}


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def body() -> None:
        with write_stream(tmp_path / "file", overwrite=False) as stream:
            stream.write(b"new")
            (tmp_path / "file").write_text("theirs")

    with pytest.raises(OutputError, match="GS-601"):
        body()
    assert content(tmp_path) == {"file": "theirs"}


def test_a_lock_left_inside_a_run_is_not_published(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", visible=True) as stage:
        fill(stage, "new")
        (stage / ".adapter.lock").write_text("7")
    assert content(tmp_path / "out") == NEW


def test_a_complete_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(OutputError, match="nothing to resume"),
        staged_folder(tmp_path / "out", visible=True, resume=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_nothing_is_published_after_a_signal_that_a_library_swallowed(
    old: Path, number: int, raised: type[BaseException]
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it

    def body() -> None:
        with leaving_on_signals(), staged_folder(old, overwrite=True) as stage:
            try:
                signal.raise_signal(number)
            except BaseException:
                fill(stage, "less than was asked for")

    try:
        with pytest.raises(raised):
            body()
    finally:
        signal.signal(signal.SIGINT, before)
    assert content(old) == OLD
    assert names(old.parent) == ["out"]
    write_text(old.parent / "after", "a later one is not told to leave")
    with staged_folder(old, overwrite=True) as stage:
        fill(stage, "new")
    assert content(old) != OLD


def test_no_file_is_published_after_a_signal_that_a_library_swallowed(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with leaving_on_signals():
            with stopping(), suppress(SystemExit):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)  # the second one raises
            assert came() == signal.SIGTERM
            with pytest.raises(SystemExit):
                write_text(tmp_path / "out", "made of less")
            assert names(tmp_path) == []
            try:
                leave(signal.SIGTERM)
            except SystemExit:
                write_text(tmp_path / "run.json", "stopped")  # clean-up on the way out
            assert names(tmp_path) == ["run.json"]
        assert came() is None
        with pytest.raises(KeyboardInterrupt):  # outside nothing is noted, and nobody is kept from going on
            leave(signal.SIGINT)
        write_text(tmp_path / "out", "new")
    finally:
        signal.signal(signal.SIGINT, before)
