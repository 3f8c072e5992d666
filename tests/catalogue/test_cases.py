"""The table of faults against the tests that exist, and what waits for a part that is not built."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from catalogue.cases import CASES
from catalogue.conftest import Place

REPOSITORY = Path(__file__).parent.parent.parent
WAITING = {number: case.waits for number, case in CASES.items() if case.waits}


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_case_is_there() -> None:
    assert list(CASES) == list(range(1, 89))
    assert [number for number, case in CASES.items() if not case.tests and not case.waits] == []


def test_every_test_that_is_named_exists() -> None:
    missing = []
    for number, case in CASES.items():
        for test in case.tests:
            path, _, name = test.partition("::")
            if not (REPOSITORY / path).parent.is_dir():
                assert path.startswith("tests/rig/"), test  # the rig has a folder of its own
                assert len(case.tests) > 1 or case.waits
            elif name not in functions(REPOSITORY / path):
                missing.append(f"{number}: {test}")
    assert missing == []


def test_every_test_of_the_catalogue_is_in_the_table() -> None:
    named = {test for case in CASES.values() for test in case.tests}
    about = {"test_the_words_run_in_a_process_too"}  # the catalogue's own footing
    here = Path(__file__).parent
    found = {
        f"tests/catalogue/{file.name}::{name}"
        for file in here.glob("test_*.py")
        if file != Path(__file__)
        for name in functions(file) - about
        if name.startswith("test_")
    }
    assert found - named == set()


def is_built(part: str, place: Place) -> bool:
    kind, _, name = part.partition(" ")
    if kind == "command":
        from gora_serve.cli.main import cli

        return name in cli.commands
    if kind == "module":
        return importlib.util.find_spec(name) is not None
    assert kind == "key"
    return f'"{name}"' in json.dumps(json.loads(place.run("hash", place.base, "--json").out))


@pytest.mark.parametrize("number", WAITING)
def test_what_waits_is_not_built_yet(place: Place, number: int) -> None:
    """The day it is, this fails with what has to be written."""
    part, wanted = WAITING[number]
    place.leaves = [place.out]
    place.adapter()
    place.run("--version")
    if is_built(part, place):
        pytest.fail(f"{part} is there now. Write case {number}, {CASES[number].what}: {wanted}")


def test_waiting_can_end(place: Place) -> None:
    place.run("--version")
    assert all(is_built(part, place) for part in ("command hash", "module gora_serve.serving.plan", "key weights_root"))
