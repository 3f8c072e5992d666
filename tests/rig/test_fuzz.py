"""The readers of untrusted files under structure-aware damage: no crash, no hang, nothing that safetensors rejects.

A few seconds here; benchmarks/fuzz.py goes on as long as it is told to.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import input_of, judge, make_manifest, prepare, targets

BAD = ("crashed", "hung", "accepted against the library")
SECONDS = 1.0  # for each reader
TARGETS = (
    "safetensors header", "index.json", "adapter_config.json", "config.json", "seal", "record", "base manifest",
)  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_damage(tiny_base: Path, tmp_path: Path, name: str) -> None:
    target = next(one for one in targets(make_manifest(tiny_base)) if one.name == name)
    path = prepare(target, tmp_path)
    chance, seen = random.Random(name), set()
    ends = time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        data = input_of(target, chance)
        verdict = judge(target, path, data)
        assert verdict.what not in BAD, (verdict, data)
        seen.add(verdict.what)
    assert seen == {"accepted", "refused"}  # the damage is neither too little nor too much


def test_the_targets_are_those_of_the_list(tiny_base: Path) -> None:
    assert tuple(target.name for target in targets(make_manifest(tiny_base))) == TARGETS


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), which=st.sampled_from(TARGETS))
def test_any_bytes(tiny_base: Path, tmp_path: Path, data: bytes, which: str) -> None:
    target = next(one for one in targets({}) if one.name == which)
    place = tmp_path / which.replace(" ", "-")
    path = place / target.file if place.exists() else prepare(target, tmp_path)
    verdict = judge(target, path, data)
    assert verdict.what not in BAD, verdict
