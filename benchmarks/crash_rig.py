"""Is an output ever torn? SIGKILL and failing calls at every call that writes, of every command that writes.

    .venv/bin/python benchmarks/crash_rig.py [--every N] [COMMAND ...]

On a tiny Llama, each command into a fresh place and over an earlier output. At each call that writes (open, write,
fsync, rename, mkdir, unlink ...) the process is killed, in one run, and the call fails, in another: the errors take
turns. Afterwards the output must be the old one byte for byte, the new one whole, or absent where there was none; the
inputs must be the same bytes; and the same command again must give the new output and leave nothing beside it.
Where strace is there and allowed, the same is done from the kernel's side, for each system call.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / part) for part in ("", "rig", "training")]
os.environ["HF_HUB_OFFLINE"] = "1"

from faults import KILL, Fault
from machine import RESULTS, facts, write
from traced import befall, points, why_not
from world import Bench, build_world, commands

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EMFILE, errno.EACCES)
LONG = 100  # calls; of a longer command --every takes each n-th
STATES = ("old", "new", "absent", "set aside", "torn")
TRACED = ("ranks", "hash", "export", "bind")


def totals(found: list[dict[str, Any]]) -> dict[str, Any]:
    states = Counter(point["state"] for point in found)
    return {
        "points": len(found), **{name: states[name] for name in STATES},
        "left something for the next run to sweep": sum(point["left"] > 0 for point in found),
        "wrong": sum(bool(point["wrong"]) for point in found),
    }  # fmt: skip


def measure(bench: Bench, every: int) -> dict[str, Any]:
    began, count = time.perf_counter(), len(bench.reference.calls)
    kills, errors = [], []
    every = every if count > LONG else 1
    for when in range(1, count + 1, every):
        kills.append(bench.point(Fault(when, "kill")))
        errors.append(bench.point(Fault(when, ERRORS[when % len(ERRORS)])))
        for point in (kills[-1], errors[-1]):
            for what in point["wrong"]:
                print(bench.name, {name: point[name] for name in ("at", "call", "file", "status")}, what, flush=True)
    return {
        "seconds": round(time.perf_counter() - began), "every": every,
        "calls that write": dict(Counter(call.name for call in bench.reference.calls)),
        "kill": totals(kills), "error": totals(errors),
        "errors": dict(Counter(errno.errorcode[ERRORS[point["at"] % len(ERRORS)]] for point in errors)),
        "faulty points": [point for point in kills + errors if point["wrong"]],
    }  # fmt: skip


def measure_traced(bench: Bench) -> dict[str, Any]:
    """The same at every system call that writes below the command's folder."""
    found = points(bench)
    results = []
    for index, point in enumerate(found):
        results += [befall(bench, point, KILL), befall(bench, point, ERRORS[index % len(ERRORS)])]
    for result in results:
        if result["wrong"]:
            print("strace", bench.name, result, flush=True)
    states = Counter(result["state"] for result in results)
    return {
        "points": len(results), **{name: states[name] for name in (*STATES, "elsewhere")},
        "wrong": sum(bool(result["wrong"]) for result in results),
        "system calls that write": dict(Counter(point.name for point in found)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    chosen = parser.parse_args()
    every = f" --every {chosen.every}" if chosen.every > 1 else ""
    result = facts(f"OMP_NUM_THREADS=1 .venv/bin/python benchmarks/crash_rig.py{every}")
    blind = why_not()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        world = build_world(Path(work) / "world")
        for command in commands():
            kinds = [
                (False, True),
                (True, True),
                *([(False, False), (True, False)] if command.name == "export" else []),
            ]
            for over, exchange in kinds:
                if not chosen.names or command.name in chosen.names:
                    bench = Bench(world, command, over=over, exchange=exchange)
                    found[bench.name] = measure(bench, chosen.every)
                    if exchange and not blind and command.name in TRACED:
                        found[bench.name]["strace"] = measure_traced(bench)
                    print(
                        bench.name,
                        json.dumps(
                            {k: found[bench.name][k] for k in ("kill", "error", "strace") if k in found[bench.name]}
                        ),
                        flush=True,
                    )
    earlier = RESULTS / "crash_rig.json"
    if chosen.names and earlier.exists():  # the others as they were found then
        found = json.loads(earlier.read_text(encoding="utf-8"))["commands"] | found
    result |= {kind: summed(found, kind) for kind in ("kill", "error", "strace")}
    result["strace"] = blind or result["strace"]
    write("crash_rig", result | {"commands": dict(sorted(found.items()))})


def summed(found: dict[str, Any], kind: str) -> dict[str, int]:
    all_of = [one[kind] for one in found.values() if kind in one]
    return {name: sum(one[name] for one in all_of) for name in (all_of or [{}])[0] if "calls" not in name}


if __name__ == "__main__":
    main()
