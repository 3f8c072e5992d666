"""A watched directory, with real folders, the real checks and the real store. Only the engine is stood in for, by a
ledger of what it was asked to hold; tests/e2e/test_live.py has the real one."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_models import llama_shapes

from gora_serve.errors import GoraError, RunError
from gora_serve.integrity.bases import locate_base
from gora_serve.serving import start
from gora_serve.serving.canary import Checked, NotItselfError
from gora_serve.serving.engine import Server
from gora_serve.serving.live import LiveAdapters, Pace
from gora_serve.serving.loading import Loaded
from gora_serve.serving.plan import Watched
from gora_serve.serving.room import PROJECTIONS, SWAP, Room
from gora_serve.serving.served import ServedAdapter, ServedBase
from serving.corpus import CONFIG, CORPUS, WEIGHTS, config, with_value, write_sound

SETTLE, PATIENCE = 1.0, 5.0
ADAPTED = ("q_proj", "v_proj", "down_proj")
ROOM = Room(adapters=4, rank=8, targets=PROJECTIONS)


@dataclass
class StandIn:
    """Holds what it is asked to, and lets go of it when nobody uses it."""

    room: Room
    resident: frozenset[int] = frozenset()
    names: dict[str, int] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    fails: dict[str, GoraError] = field(default_factory=dict)

    def load(self, adapter: ServedAdapter) -> Loaded:
        assert load_file(adapter.path / WEIGHTS), "it is in the store"
        assert len(self.resident) < self.room.adapters + SWAP, "the last slot stays empty, and nothing is evicted"
        number = len(self.loads) + 1
        self.loads.append(adapter.name)
        self.resident |= {number}
        if adapter.name in self.fails:
            raise self.fails[adapter.name]
        self.names[adapter.name] = number
        return Loaded(adapter, number, Checked(adapter.name, True, None), 0.0)

    def withdraw(self, name: str) -> None:
        del self.names[name]

    def unload(self) -> None:
        self.resident = frozenset(self.resident & ({*self.names.values()} | self.busy))


class Place:
    """The directory, what watches it, and a clock that only the test moves."""

    said: list[str]
    fields: list[dict[str, object]]

    def __init__(
        self, folder: Path, base: ServedBase, store: Path, room: Room = ROOM, models: tuple[str, ...] = ("base",)
    ) -> None:
        self.folder, self.now = folder, 100.0
        self.engine, self.said, self.fields = StandIn(room), [], []
        watched = Watched(folder, room, base, store)
        self.live = LiveAdapters(
            watched, Server("", 0, models), self.engine, say=self.say,
            pace=Pace(0.0, SETTLE, PATIENCE, lambda: self.now),
        )  # fmt: skip

    def say(self, text: str, **fields: object) -> None:
        self.said.append(text)
        self.fields.append(fields)

    def wait(self, seconds: float = SETTLE) -> None:
        """Look, and look again after a while."""
        self.live.step()
        self.now += seconds
        self.live.step()

    def refused(self) -> dict[str, str]:
        self.wait(PATIENCE)
        found: dict[str, str] = {}
        for line in self.said:
            match = re.match(
                r"(refused|served|a new version is served|withdrawn): (.+?)(?: \(its older .*?\))?: ", line
            )
            if match and match[1] != "refused":
                found.pop(match[2], None)
            elif match and (code := re.search(r"\[(GS-\d+)\]", line)):
                found[match[2]] = code[1]
        return found

    def lines(self, word: str) -> list[str]:
        return [line for line in self.said if line.startswith(word)]


@pytest.fixture(scope="module")
def served_base(tiny_base: Path) -> ServedBase:
    return start.served_base(locate_base(str(tiny_base)))


@pytest.fixture
def place(tmp_path: Path, served_base: ServedBase) -> Iterator[Place]:
    (tmp_path / "live").mkdir()
    made = Place(tmp_path / "live", served_base, tmp_path / "store")
    yield made
    made.live.release()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write a sound adapter outside of the directory."""
    shapes = {path: shape for path, shape in llama_shapes().items() if path.endswith(ADAPTED)}

    def write(name: str, seed: int = 0, *, rank: int = 4) -> Path:
        return write_sound(tmp_path / "made" / name, shapes, seed=seed, rank=rank)

    return write


def drop(place: Place, made: Path, name: str | None = None) -> Path:
    return Path(shutil.copytree(made, place.folder / (name or made.name)))


def test_what_is_dropped_in_is_served_from_the_store(place: Place, make: Callable[..., Path], tmp_path: Path) -> None:
    place.wait()
    assert place.engine.loads == [], "an empty directory is a good one"
    drop(place, make("a"))
    place.wait()
    assert place.engine.names == {"a": 1}
    server = place.live.joined(Server("", 0, ("base",)))
    assert server.models == ("base", "a")
    assert server.adapters[0].path.parent == tmp_path / "store"
    assert server.adapters[0].source == place.folder / "a"
    place.wait(1000.0)
    assert place.engine.loads == ["a"], "it is loaded once"
    assert place.refused() == {}


def test_the_whole_corpus_changes_nothing(place: Place, make: Callable[..., Path]) -> None:
    """Each broken adapter is refused in its own words, once; the good ones go on being served."""
    sound = make("sound")
    drop(place, make("good", 1))
    place.wait()
    names = {}
    for index, row in enumerate(CORPUS):
        names[f"b{index}"] = row
        row.build(sound, place.folder / f"b{index}")
    drop(place, make("late", 2))
    place.wait()
    assert place.engine.names == {"good": 1, "late": 2}
    assert place.lines("refused") == [], "they may still be uploads"
    assert place.refused() == {name: row.code for name, row in names.items()}
    for name, row in names.items():
        lines = place.lines(f"refused: {name}:")
        assert len(lines) == 1
        for text in (*row.told, row.code, str(place.folder / name), "; try: "):
            assert text in lines[0]
    place.wait(1000.0)
    assert len(place.lines("refused")) == len(CORPUS), "nothing is told twice"
    assert place.engine.names == {"good": 1, "late": 2}
    assert place.engine.loads == ["good", "late"]


def test_every_row_as_a_new_version(place: Place, make: Callable[..., Path]) -> None:
    """The version that was good goes on being served."""
    sound = make("a")
    drop(place, sound)
    place.wait()
    for row in CORPUS[::6]:
        shutil.rmtree(place.folder / "a")
        row.build(sound, place.folder / "a")
        assert place.refused() == {"a": row.code}
        assert "its older version goes on being served" in place.said[-1]
    assert place.engine.names == {"a": 1}
    shutil.rmtree(place.folder / "a")
    drop(place, make("b", 3), "a")
    assert place.refused() == {}
    assert place.engine.names == {"a": 2}


def test_a_new_version_takes_the_name_and_the_old_one_is_unloaded_when_it_is_done(
    place: Place, make: Callable[..., Path]
) -> None:
    drop(place, make("a"))
    place.wait()
    first = place.live.joined(Server("", 0, ())).adapters[0].path
    place.engine.busy = {1}
    shutil.rmtree(place.folder / "a")
    drop(place, make("b", 1), "a")
    place.wait()
    assert place.engine.names == {"a": 2}
    place.wait()
    assert place.engine.resident == {1, 2}, "a request is at work on it"
    second = place.live.joined(Server("", 0, ())).adapters[0].path
    assert second != first, "no answer of the old version's cache is the new one's"
    place.engine.busy = set()
    place.wait()
    assert place.engine.resident == {2}
    assert place.lines("unloaded: a") == [f"unloaded: a, version {first.name[:12]}"]


def test_never_more_are_loaded_than_there_are_slots(place: Place, make: Callable[..., Path]) -> None:
    """The stand-in ends the test if they are. Versions that follow fast wait for the one before to be done."""
    for name in "abcd":
        drop(place, make(name, ord(name)))
    place.wait()
    place.engine.busy = {1, 2}
    for version in (1, 2):
        for name in "ab":
            shutil.rmtree(place.folder / name)
            drop(place, make(f"{name}{version}", 10 * version + ord(name)), name)
        place.wait()
    assert len(place.engine.resident) == ROOM.adapters + SWAP
    assert place.engine.names["a"] == 5
    assert place.engine.names["b"] == 2, "it waits"
    place.engine.busy = set()
    for _ in range(4):
        place.wait()
    assert place.engine.names == {"a": 6, "b": 7, "c": 3, "d": 4}
    assert place.engine.resident == {3, 4, 6, 7}
    assert place.refused() == {}


def test_what_is_taken_out_is_withdrawn_and_unloaded(place: Place, make: Callable[..., Path]) -> None:
    drop(place, make("a"))
    drop(place, make("b", 1))
    place.wait()
    shutil.rmtree(place.folder / "a")
    place.live.step()
    assert set(place.engine.names) == {"a", "b"}, "it may be replaced"
    place.now += SETTLE
    place.live.step()
    assert place.engine.names == {"b": 2}
    assert place.engine.resident == {2}
    drop(place, make("c", 2), "a")
    place.wait()
    assert place.engine.names == {"a": 3, "b": 2}


def test_a_folder_that_is_touched_is_not_loaded_again(place: Place, make: Callable[..., Path]) -> None:
    folder = drop(place, make("a"))
    place.wait()
    os.utime(folder / WEIGHTS)
    (folder / "README.md").write_text("a better description")
    place.wait()
    assert place.engine.loads == ["a"]
    config(lora_alpha=16)(folder)
    place.wait()
    assert place.engine.names == {"a": 2}, "another scale is another version"


def test_an_upload_in_pieces_is_never_called_bad(place: Place, make: Callable[..., Path]) -> None:
    made, folder = make("a"), place.folder / "a"
    folder.mkdir()
    data = (made / WEIGHTS).read_bytes()
    with (folder / WEIGHTS).open("wb") as stream:
        for begin in range(0, len(data), len(data) // 7):
            stream.write(data[begin : begin + len(data) // 7])
            stream.flush()
            place.live.step()
            place.now += 0.7 * PATIENCE
    place.wait()
    shutil.copy(made / CONFIG, folder)
    place.wait()
    assert place.engine.names == {"a": 1}
    assert place.lines("refused") == []


def test_an_upload_that_stops_is_told_once_and_served_when_it_goes_on(place: Place, make: Callable[..., Path]) -> None:
    made, folder = make("a"), place.folder / "a"
    folder.mkdir()
    shutil.copy(made / CONFIG, folder)
    assert place.refused() == {"a": "GS-583"}
    place.wait(1000.0)
    assert len(place.lines("refused")) == 1
    shutil.copy(made / WEIGHTS, folder)
    place.wait()
    assert place.engine.names == {"a": 1}
    assert place.refused() == {}


@pytest.mark.parametrize(
    ("name", "code"),
    [("two words", "GS-281"), ("Base", "GS-282"), ("con", "GS-281"),
     ("text", "GS-281"), ("image", "GS-281"), ("a" * 65, "GS-281"), ("b\x1b[31m", "GS-281"),
     ("ä", "GS-281"), ("-x", "GS-281")],
)  # fmt: skip
def test_names_that_cannot_be_served(place: Place, make: Callable[..., Path], name: str, code: str) -> None:
    drop(place, make("a"), name)
    assert place.refused() == {name: code}
    assert "rename the folder" in place.said[-1]
    assert place.fields[-1] == {"level": "warning", "model": name, "code": code}
    assert place.engine.loads == []


def test_a_name_that_is_no_text(place: Place, make: Callable[..., Path]) -> None:
    shutil.copytree(os.fsencode(make("a")), os.fsencode(place.folder) + b"/\xff")
    assert list(place.refused().values()) == ["GS-281"]


def test_names_that_differ_by_case_alone(place: Place, make: Callable[..., Path]) -> None:
    drop(place, make("a"))
    place.wait()
    drop(place, make("b", 1), "A")
    assert place.refused() == {"A": "GS-282"}
    assert place.engine.names == {"a": 1}


def test_a_name_is_free_again_when_the_other_has_gone(place: Place, make: Callable[..., Path]) -> None:
    """As it would be after a restart."""
    drop(place, make("a"))
    place.wait()
    drop(place, make("b", 1), "A")
    assert place.refused() == {"A": "GS-282"}
    shutil.rmtree(place.folder / "a")
    place.wait()
    assert set(place.engine.names) == {"A"}
    assert place.refused() == {}


def test_what_is_not_looked_at(place: Place, make: Callable[..., Path]) -> None:
    drop(place, make("a"), ".a.partial")
    drop(place, make("b"), ".git")
    assert place.refused() == {}
    assert place.engine.loads == []


def test_links_stay_in_the_directory(place: Place, make: Callable[..., Path]) -> None:
    made = make("a")
    drop(place, made, ".releases")
    (place.folder / "inside").symlink_to(".releases")
    (place.folder / "outside").symlink_to(made)
    (place.folder / "loop").symlink_to("loop")
    (place.folder / "broken").symlink_to("nothing")
    (place.folder / "file").mkdir()
    shutil.copy(made / CONFIG, place.folder / "file")
    (place.folder / "file" / WEIGHTS).symlink_to(made / WEIGHTS)
    (place.folder / "plain").write_text("x")
    os.mkfifo(place.folder / "pipe")
    assert place.refused() == {
        "outside": "GS-4604", "loop": "GS-4604", "file": "GS-4604", "broken": "GS-583", "plain": "GS-3222",
        "pipe": "GS-583",
    }  # fmt: skip
    assert place.engine.names == {"inside": 1}


def test_a_link_that_is_turned_is_a_new_version(place: Place, make: Callable[..., Path]) -> None:
    for version in (1, 2):
        drop(place, make(f"v{version}", version), f".v{version}")
    (place.folder / "a").symlink_to(".v1")
    place.wait()
    (place.folder / ".new").symlink_to(".v2")
    (place.folder / ".new").rename(place.folder / "a")
    place.wait()
    assert place.engine.names == {"a": 2}


def test_what_the_engine_has_no_room_for(place: Place, make: Callable[..., Path], tmp_path: Path) -> None:
    drop(place, make("large", rank=16))
    drop(place, make("small"))
    assert place.refused() == {"large": "GS-4601"}
    assert "--max-rank 16" in place.lines("refused: large")[0]
    assert place.engine.loads == ["small"]
    assert len(list((tmp_path / "store").iterdir())) == 1, "it is not even copied"


def test_modules_that_the_engine_was_not_started_for(
    tmp_path: Path, served_base: ServedBase, make: Callable[..., Path]
) -> None:
    (tmp_path / "live").mkdir()
    place = Place(tmp_path / "live", served_base, tmp_path / "store", Room(4, 8, frozenset({"q_proj", "v_proj"})))
    drop(place, make("a"))
    assert place.refused() == {"a": "GS-4602"}
    assert "--lora-target-modules down_proj q_proj v_proj" in place.said[-1]
    assert place.engine.loads == []


def test_one_too_many_is_served_when_another_goes(place: Place, make: Callable[..., Path]) -> None:
    for name in "abcde":
        drop(place, make(name, ord(name)))
    assert place.refused() == {"e": "GS-4603"}
    assert "--max-adapters 5" in place.said[-1]
    shutil.rmtree(place.folder / "b")
    place.wait()
    place.wait()
    assert set(place.engine.names) == set("acde")
    assert place.refused() == {}


def test_adapters_of_the_command_line_count_too(
    tmp_path: Path, served_base: ServedBase, make: Callable[..., Path]
) -> None:
    (tmp_path / "live").mkdir()
    place = Place(tmp_path / "live", served_base, tmp_path / "store", models=("base", "x", "y", "z"))
    place.engine.resident, place.engine.busy = frozenset({91, 92, 93}), {91, 92, 93}
    for name in ("X", "a", "b"):
        drop(place, make(name, ord(name)))
    assert place.refused() == {"X": "GS-282", "b": "GS-4603"}
    assert set(place.engine.names) == {"a"}


def test_a_directory_that_cannot_be_read_changes_nothing(place: Place, make: Callable[..., Path]) -> None:
    drop(place, make("a"))
    place.wait()
    place.folder.rename(place.folder.with_name("elsewhere"))
    for _ in range(3):
        with pytest.raises(GoraError, match="GS-5600"):
            place.live.step()
        place.now += 100.0
    place.folder.with_name("elsewhere").rename(place.folder)
    place.wait()
    assert place.engine.names == {"a": 1}
    assert place.engine.loads == ["a"]


def test_what_the_engine_refuses_is_tried_again_later(place: Place, make: Callable[..., Path]) -> None:
    place.engine.fails["a"] = RunError("no answer", code="GS-786", hint="none")
    drop(place, make("a"))
    assert place.refused() == {"a": "GS-786"}
    place.wait()
    assert place.engine.resident == frozenset(), "it is unloaded, whatever it was"
    del place.engine.fails["a"]
    place.wait(30.0)
    assert place.engine.names == {}
    place.wait(60.0)
    assert place.engine.names == {"a": 2}
    assert place.refused() == {}


def test_what_does_not_answer_as_itself_is_not_tried_again(place: Place, make: Callable[..., Path]) -> None:
    place.engine.fails["a"] = NotItselfError("another answer", code="GS-7351", hint="none")
    drop(place, make("a"))
    assert place.refused() == {"a": "GS-7351"}
    del place.engine.fails["a"]
    place.wait(1000.0)
    assert place.engine.names == {}
    shutil.rmtree(place.folder / "a")
    drop(place, make("b", 1), "a")
    place.wait()
    assert place.engine.names == {"a": 2}, "another version is"


def test_after_a_restart_the_same_adapters_are_served(
    place: Place, make: Callable[..., Path], served_base: ServedBase, tmp_path: Path
) -> None:
    for name in "ab":
        drop(place, make(name, ord(name)))
    drop(place, make("bad"))
    with_value(float("nan"))(place.folder / "bad")
    place.wait()
    before = place.live.joined(Server("", 0, ()))
    again = Place(place.folder, served_base, tmp_path / "store")
    assert not again.live.caught_up()
    again.wait()
    assert again.live.caught_up()
    after = again.live.joined(Server("", 0, ()))
    assert after.models == before.models == ("a", "b")
    assert [one.path for one in after.adapters] == [one.path for one in before.adapters]
    assert again.refused() == {"bad": "GS-339"}
    again.live.release()


def test_an_upload_does_not_keep_a_server_from_starting(place: Place) -> None:
    (place.folder / "a").mkdir()
    for piece in range(8):
        (place.folder / "a" / f"part-{piece}").write_text("x")
        place.live.step()
        place.now += 0.5
    assert place.live.caught_up()


def test_the_server_is_told_of_while_another_one_comes(place: Place, make: Callable[..., Path]) -> None:
    """The server's loop reads what the thread writes."""

    class Between(tuple):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[object]:
            place.live._served["late"] = place.live._served["a"]
            return super().__iter__()

    drop(place, make("a"))
    place.wait()
    loaded = place.live._served["a"]
    place.live._served["a"] = Between(loaded)  # type: ignore[assignment]
    assert place.live.joined(Server("", 0, ())).models == ("a",)
    place.live._served = {"a": loaded}


def test_it_looks_from_a_thread_of_its_own(tmp_path: Path, served_base: ServedBase, make: Callable[..., Path]) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    engine, said = StandIn(ROOM), list[str]()

    def say(text: str, **_: object) -> None:
        said.append(text)

    watched = Watched(folder, ROOM, served_base, tmp_path / "store")
    live = LiveAdapters(watched, Server("", 0, ("base",)), engine, say=say, pace=Pace(0.02, 0.05, 0.1))
    with live:
        shutil.copytree(make("a"), folder / "a")
        eventually(lambda: engine.names == {"a": 1})
        folder.rename(tmp_path / "gone")
        eventually(lambda: any("GS-5600" in line for line in said))
        time.sleep(0.2)
        assert sum("GS-5600" in line for line in said) == 1
        (tmp_path / "gone").rename(folder)
        eventually(lambda: said[-1].endswith("is looked at again"))
        engine.fails["b"] = ZeroDivisionError("a slip of ours")  # type: ignore[assignment]
        shutil.copytree(make("b", 1), folder / "b")
        eventually(lambda: not live._thread.is_alive())
        with pytest.raises(ZeroDivisionError):
            live.look()


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
