"""Do the readers of untrusted files hold under damage? Structure-aware mutations, for as long as it is told to.

    .venv/bin/python benchmarks/fuzz.py [--seconds N] [--seed S]

Safetensors headers, shard indexes, adapter and model configurations, seals, records, base manifests. Counts inputs that
were accepted, refused with a GoraError, and those that must not be: any other exception, more than a second, or a file
accepted that the safetensors library rejects. Such inputs are written to the folder fuzz-findings.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / part) for part in ("", "rig")]

from machine import facts, write
from mutations import input_of, judge, make_manifest, prepare, targets
from tiny_models import build_llama

BAD = ("crashed", "hung", "accepted against the library")
SLICE = 0.5  # seconds for each reader in turn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    chance = random.Random(chosen.seed)
    counts: dict[str, Counter[str]] = {}
    codes: dict[str, Counter[str]] = {}
    findings: list[dict[str, str]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        folder = Path(work)
        build_llama().save_pretrained(folder / "base")
        found = [(target, prepare(target, folder)) for target in targets(make_manifest(folder / "base"))]
        while time.perf_counter() - began < chosen.seconds:
            for target, path in found:
                ends = time.perf_counter() + SLICE
                while time.perf_counter() < ends:
                    data = input_of(target, chance)
                    verdict = judge(target, path, data)
                    counts.setdefault(target.name, Counter())[verdict.what] += 1
                    if verdict.what == "refused":
                        codes.setdefault(target.name, Counter())[verdict.detail] += 1
                    elif verdict.what in BAD and len(findings) < 50:
                        findings.append(keep(target.name, data, verdict.what, verdict.detail))
    total = sum(sum(one.values()) for one in counts.values())
    result: dict[str, Any] = facts(
        f".venv/bin/python benchmarks/fuzz.py --seconds {chosen.seconds:g} --seed {chosen.seed}"
    )
    result |= {
        "seconds": round(time.perf_counter() - began, 1),
        "executions": total,
        **{what: sum(one[what] for one in counts.values()) for what in ("accepted", "refused", *BAD)},
        "readers": {name: dict(one) for name, one in counts.items()},
        "refused by code": {name: dict(sorted(one.items())) for name, one in codes.items()},
        "findings": findings,
    }
    write("fuzz", result)
    sys.exit(1 if findings else 0)


def keep(name: str, data: bytes, what: str, detail: str) -> dict[str, str]:
    """Write the input where it can be looked at; return the line of the report."""
    place = Path("fuzz-findings")
    place.mkdir(exist_ok=True)
    file = place / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    file.write_bytes(data)
    print(what, name, detail, file, flush=True)
    return {"reader": name, "what": what, "detail": detail[:300], "file": file.name}


if __name__ == "__main__":
    main()
