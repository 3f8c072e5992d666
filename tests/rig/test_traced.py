"""What test_crash.py does, by strace: at system calls, whoever makes them. All points in benchmarks/crash_rig.py."""

from __future__ import annotations

import errno
from collections.abc import Mapping

import pytest
from faults import KILL
from test_crash import order_faults
from traced import befall, order_of, points, why_not
from world import Bench, commands

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)
PLACES = [f"{command.name} {how}" for command in commands() for how in ("fresh", "--overwrite")]


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("place", ["hash fresh", "export --overwrite"])
def test_killed_or_failing_at_a_system_call(benches: Mapping[str, Bench], place: str) -> None:
    bench = benches[place]
    found = points(bench)
    step = max(1, len(found) // 5)
    results = [befall(bench, point, KILL) for point in found[::step]]
    results += [befall(bench, point, ERRORS[i % len(ERRORS)]) for i, point in enumerate(found[1::step])]
    assert [result for result in results if result["wrong"]] == []
    assert sum(result["state"] != "elsewhere" for result in results) > len(results) // 2


@pytest.mark.parametrize("place", PLACES)
def test_system_calls_are_in_order_and_none_writes_to_an_input(benches: Mapping[str, Bench], place: str) -> None:
    bench = benches[place]
    found = points(bench, bench.world.work)
    assert [point for point in found if str(bench.world.inputs) in point.line] == []
    calls = order_of([point for point in found if str(bench.folder) in point.line], bench.folder)
    assert order_faults(calls, str(bench.folder)) == []
    assert sum(call.name == "fsync" for call in calls) >= 2
