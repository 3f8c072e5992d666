"""Commands that are killed, or whose calls fail, at the calls that write: the output is old, new or absent, never torn.

Each n-th point here; all of them in benchmarks/crash_rig.py.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import pytest
from faults import KILL, REMOVALS, Call, Fault
from world import Bench, commands

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EMFILE)
# Of the commands with many points; the others are done whole.
POINTS = {
    "fit": 1, "probe": 1, "convert": 2, "export": 4, "export --gguf": 2, "bind": 2, "merge": 2,
    "merge --into adapter": 1,
}  # fmt: skip
PLACES = [f"{command.name} {how}" for command in commands() for how in ("fresh", "--overwrite")]
PLACES += ["export fresh without renameat2", "export --overwrite without renameat2"]


def sample(bench: Bench, shift: int) -> list[int]:
    """Some of the points of the command, over its whole length; the last one is always among them."""
    count = len(bench.reference.calls)
    wanted = POINTS.get(bench.command.name, count)
    return sorted({count, *(1 + (shift + index * count // wanted) % count for index in range(wanted))})


@pytest.mark.parametrize("place", PLACES)
def test_killed(benches: Mapping[str, Bench], place: str) -> None:
    bench = benches[place]
    points = [bench.point(Fault(when, KILL)) for when in sample(bench, 0)]
    assert [point for point in points if point["wrong"]] == []


@pytest.mark.parametrize("place", PLACES)
def test_a_failing_call(benches: Mapping[str, Bench], place: str) -> None:
    bench = benches[place]
    points = [bench.point(Fault(when, ERRORS[when % len(ERRORS)])) for when in sample(bench, 1)]
    assert [point for point in points if point["wrong"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_point(benches: Mapping[str, Bench], place: str) -> None:
    bench = benches[place]
    for when in range(1, len(bench.reference.calls) + 1):
        for what in (KILL, ERRORS[when % len(ERRORS)]):
            assert bench.point(Fault(when, what))["wrong"] == []


@pytest.mark.parametrize("place", PLACES)
def test_files_are_synced_before_they_are_renamed_and_folders_after(benches: Mapping[str, Bench], place: str) -> None:
    bench = benches[place]
    assert order_faults(bench.reference.calls, str(bench.folder)) == []


def order_faults(calls: tuple[Call, ...], folder: str) -> list[str]:
    """What a power failure could tear: a file written but not synced before the rename that publishes it, a rename that
    no fsync of the parent follows."""
    dirty: set[str] = set()
    waiting: set[str] = set()  # parents of what was renamed
    faults = []
    for call in calls:
        beside = call.path.endswith(".lock") or call.path.endswith("metrics.jsonl")  # neither is published by itself
        if call.name in ("open", "write", "pwrite") and not beside:
            dirty.add(call.path)
        elif call.name in REMOVALS:
            dirty -= {path for path in dirty if path == call.path or path.startswith(f"{call.path}/")}
        elif call.name == "fsync":
            dirty.discard(call.path)
            waiting.discard(call.path)
        elif call.name in ("replace", "renameat2"):  # a plain rename sets aside what is to be deleted
            published = [path for path in dirty if path == call.path or path.startswith(f"{call.path}/")]
            faults += [f"{path} is renamed before it is synced" for path in published]
            waiting.add(call.path.rpartition("/")[0])
    faults += [f"{path} is written and never synced" for path in dirty if path.startswith(folder)]
    return faults + [f"{path} is not synced after a rename in it" for path in waiting]


def test_the_check_of_the_order_finds_faults() -> None:
    good = [Call("open", "/o/.t.tmp"), Call("write", "/o/.t.tmp"), Call("fsync", "/o/.t.tmp")]
    assert order_faults((*good, Call("replace", "/o/.t.tmp"), Call("fsync", "/o")), "/o") == []
    assert len(order_faults((*good[:2], Call("replace", "/o/.t.tmp"), Call("fsync", "/o")), "/o")) == 2
    assert order_faults((*good, Call("replace", "/o/.t.tmp")), "/o") == ["/o is not synced after a rename in it"]
