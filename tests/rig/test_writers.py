"""Two writers, signals, full disks: what meets a command from outside."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from faults import Fault
from world import Bench, start, wait

ROUNDS = 50


@pytest.mark.parametrize(
    ("place", "rounds"), [("export fresh", ROUNDS), ("export --overwrite", 10), ("hash fresh", 10)]
)
def test_two_writers(benches: Mapping[str, Bench], place: str, rounds: int) -> None:
    """Exactly one wins; the other is refused with 6 at once, or came after the first had ended."""
    bench = benches[place]
    refused = 0
    for _ in range(rounds):
        bench.reset()
        gate, opened = os.pipe()
        children = [
            start(bench.new_argv(), bench.place / f"writer-{n}", before=partial(os.read, gate, 1)) for n in (0, 1)
        ]
        time.sleep(0.02)
        os.write(opened, b"go")
        ended = [wait(child) for child in children]
        os.close(gate)
        os.close(opened)
        statuses = sorted(one.status for one in ended)
        assert statuses == [0, 6] or (bench.over and statuses == [0, 0]), [one.stderr for one in ended]
        refused += statuses == [0, 6]
        assert all("GS-60" in one.stderr for one in ended if one.status == 6)
        assert bench.judge() == "new"
        assert bench.left() == []
    assert refused > 0 or bench.over


def test_the_second_writer_is_refused_within_a_second(benches: Mapping[str, Bench]) -> None:
    from gora_serve.integrity.staging import staged_folder

    bench = benches["export fresh"]
    bench.reset()
    with staged_folder(bench.folder / "out") as stage:
        began = time.perf_counter()
        ended = bench.run()
        assert time.perf_counter() - began < 1
        assert ended.status == 6
        assert f"pid {os.getpid()}" in ended.stderr
        (stage / "gora_manifest.json").write_text("mine")
    assert (bench.folder / "out" / "gora_manifest.json").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("place", "rounds"), [("export --overwrite", 10), ("convert fresh", 4), ("fit --overwrite", 2)]
)
def test_a_signal_at_a_random_moment(benches: Mapping[str, Bench], place: str, rounds: int, number: int) -> None:
    bench = benches[place]
    bench.reset()
    began = time.perf_counter()
    bench.run()
    usual = time.perf_counter() - began
    generator, left = random.Random(int(number)), 0
    for _ in range(rounds):
        bench.reset()
        running, said = os.pipe()
        child = start(
            bench.new_argv(), bench.place / "scratch", watch=bench.folder, before=partial(os.write, said, b"1")
        )
        os.read(running, 1)
        time.sleep(generator.uniform(0.01, usual))
        os.kill(child.pid, number)
        ended = wait(child)
        os.close(running)
        os.close(said)
        state = bench.judge()
        assert state in (("old", "new") if bench.over else ("absent", "new")), state
        assert ended.status in (128 + number, 0), ended
        assert ended.status != 0 or state == "new"
        left += bool(bench.left())
        assert bench.retry() is None
    assert left <= 1  # between two instructions of Python a signal can still come before the clean-up is armed


def limit(size: int) -> Callable[[], None]:
    def lower() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return lower


@pytest.mark.parametrize("place", ["export --overwrite", "convert fresh", "hash fresh", "fit fresh"])
def test_no_file_may_grow(benches: Mapping[str, Bench], place: str) -> None:
    """RLIMIT_FSIZE, as a quota on single files."""
    bench = benches[place]
    for size in (0, 700):
        bench.reset()
        ended = bench.run(before=limit(size))
        assert ended.status == 5, ended.stderr
        assert "GS-505" in ended.stderr
        assert "file:" in ended.stderr
        assert "kept:" in ended.stderr
        assert bench.judge() == ("old" if bench.over else "absent")
        assert bench.left() == []
        assert bench.retry() is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("place", ["export fresh", "convert --overwrite", "hash --overwrite"])
def test_a_full_disk_at_every_write(benches: Mapping[str, Bench], place: str, number: int) -> None:
    bench = benches[place]
    for when, call in enumerate(bench.reference.calls, 1):
        if call.name in ("write", "pwrite"):
            point = bench.point(Fault(when, number))
            assert point["wrong"] == []
            assert point["status"] == 5


@pytest.mark.parametrize("place", ["export fresh", "export --overwrite", "convert fresh", "hash fresh", "fit fresh"])
def test_a_small_disk(benches: Mapping[str, Bench], place: str, small_disk: Callable[[int], Path]) -> None:
    bench = benches[place]
    usual, seen = bench.folder, set()
    try:
        for kib in (4, 32, 64, 2048):
            bench.folder = small_disk(kib) / "outputs"
            try:
                bench.reset()
            except OSError:  # the earlier output alone is too large for it
                continue
            ended = bench.run(before=nobody_asks)
            state = bench.judge()
            seen.add(ended.status)
            assert ended.status in (0, 5), ended.stderr
            assert state == ("new" if ended.status == 0 else "old" if bench.over else "absent")
            if ended.status:
                assert re.search(r"error\[GS-505\].*\n  file:.*\n  kept:", ended.stderr), ended.stderr
            assert bench.left() == []
    finally:
        bench.folder = usual
    assert 5 in seen


def nobody_asks() -> None:
    """As on a file system that does not say what is free: the disk is found to be full in the midst of writing."""

    def refuse(_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    os.statvfs = refuse  # type: ignore[assignment]


@pytest.mark.parametrize("place", ["bind --overwrite", "export --overwrite", "convert fresh", "fit fresh"])
def test_no_room_is_told_before_work(
    benches: Mapping[str, Bench], place: str, small_disk: Callable[[int], Path]
) -> None:
    bench = benches[place]
    usual = bench.folder
    try:
        bench.folder = small_disk(2048) / "outputs"
        bench.reset()
        ended = bench.run()
        assert ended.status == 5, ended.stderr
        said = re.search(
            r"error\[GS-560\].*\n  file:.*\n  expected: (\d+) bytes free: (\d+) for the output.*\n"
            r"  actual: (\d+) bytes free\n  kept: nothing was changed\n  try: ",
            ended.stderr,
        )
        assert said, ended.stderr
        needed, output, free = map(int, said.groups())
        assert output + (64 << 20) == needed > free
        assert free <= 2 << 20
        assert bench.judge() == ("old" if bench.over else "absent")
        assert bench.left() == []
    finally:
        bench.folder = usual
