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

from faults import Fault
from machine import facts, write
from world import Bench, build_world, commands

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EMFILE, errno.EACCES)


def totals(points: list[dict[str, Any]]) -> dict[str, Any]:
    states = Counter(point["state"] for point in points)
    return {
        "points": len(points), **{name: states[name] for name in ("old", "new", "absent", "set aside", "torn")},
        "left something for the next run to sweep": sum(point["left"] > 0 for point in points),
        "wrong": sum(bool(point["wrong"]) for point in points),
    }  # fmt: skip


def measure(bench: Bench, every: int) -> dict[str, Any]:
    count = len(bench.reference.calls)
    kills, errors = [], []
    for when in range(1, count + 1, every):
        kills.append(bench.point(Fault(when, "kill")))
        errors.append(bench.point(Fault(when, ERRORS[when % len(ERRORS)])))
        for point in (kills[-1], errors[-1]):
            for what in point["wrong"]:
                print(bench.name, {name: point[name] for name in ("at", "call", "file", "status")}, what, flush=True)
    return {
        "calls that write": dict(Counter(call.name for call in bench.reference.calls)),
        "kill": totals(kills), "error": totals(errors),
        "errors": dict(Counter(errno.errorcode[ERRORS[point["at"] % len(ERRORS)]] for point in errors)),
        "faulty points": [point for point in kills + errors if point["wrong"]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    chosen = parser.parse_args()
    result = facts("OMP_NUM_THREADS=1 .venv/bin/python benchmarks/crash_rig.py")
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        world = build_world(Path(work) / "world")
        for command in commands():
            kinds = [(False, True), (True, True), *([(False, False), (True, False)] if command.name == "export" else [])]
            for over, exchange in kinds:
                if not chosen.names or command.name in chosen.names:
                    bench = Bench(world, command, over=over, exchange=exchange)
                    found[bench.name] = measure(bench, chosen.every)
                    print(bench.name, json.dumps({k: found[bench.name][k] for k in ("kill", "error")}), flush=True)
    for kind in ("kill", "error"):
        result[kind] = {
            name: sum(one[kind][name] for one in found.values()) for name in next(iter(found.values()))[kind]
        }
    result |= {"seconds": round(time.perf_counter() - began), "commands": found}
    if not chosen.names and chosen.every == 1:
        write("crash_rig", result)
    else:
        print(json.dumps({kind: result[kind] for kind in ("kill", "error")}, indent=2))


if __name__ == "__main__":
    main()
