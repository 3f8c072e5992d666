"""Every GS code of the source is documented in docs/errors.md, and the reverse; its first digit fits its class."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gora_serve import errors
from gora_serve.cli.main import cli

REPOSITORY = Path(__file__).parent.parent
CODE = re.compile(r"GS-\d{3,4}")
DOCUMENT = REPOSITORY / "docs" / "errors.md"
CLASSES = {cls.__name__: cls for cls in errors.GoraError.__subclasses__()}
# Helpers that are handed a code, and a class of one module: what they raise, or what it is a kind of.
RAISES = {
    "_require_alive": "RunError", "_check_loss": "RunError", "check_loss": "RunError", "Fault": "InputError",
    "asking": "MachineError", "NotItselfError": "RunError",
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """One place of the source that names a code."""

    code: str
    file: str
    line: int
    raised: str | None  # the class or helper whose call holds it; None for a code that is passed on


def uses_of(text: str, file: str) -> list[Use]:
    found: list[Use] = []

    def visit(node: ast.AST, call: str | None) -> None:
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            call = name if name in CLASSES or name in RAISES else call
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
            found.append(Use(node.value, file, node.lineno, call))
        for child in ast.iter_child_nodes(node):
            visit(child, call)

    visit(ast.parse(text), None)
    return found


def source_files() -> Iterator[Path]:
    for package in ("gora_serve", "converters"):
        yield from sorted((REPOSITORY / package).rglob("*.py"))


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return [
        use
        for path in source_files()
        for use in uses_of(path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY).as_posix())
    ]


def documented() -> list[tuple[str, str, str, str, str]]:
    """(section's digit, code, exit, meaning, what to do) of each row of the tables."""
    rows, digit = [], ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            digit = line[3]
        if line.startswith("| GS-"):
            code, status, meaning, action = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append((digit, code, status, meaning, action))
    return rows


def test_the_walk_finds_codes(uses: list[Use]) -> None:
    assert len({use.code for use in uses}) > 100
    text = 'raise InputError("x", code="GS-399" if a else "GS-398")\nFault("GS-397", "y")\nz = "GS-396"'
    assert [(use.code, use.raised) for use in uses_of(text, "f")] == [
        ("GS-399", "InputError"), ("GS-398", "InputError"), ("GS-397", "Fault"), ("GS-396", None),
    ]  # fmt: skip


def test_every_code_is_documented_and_every_documented_code_is_used(uses: list[Use]) -> None:
    in_source, in_document = {use.code for use in uses}, {code for _, code, *_ in documented()}
    assert sorted(in_source - in_document) == [], "docs/errors.md lacks these"
    assert sorted(in_document - in_source) == [], "docs/errors.md has codes that nothing raises"


def test_the_document_is_in_order() -> None:
    rows = documented()
    codes = [code for _, code, *_ in rows]
    assert codes == sorted(codes, key=lambda code: (code[3], int(code[3:])))
    assert [code for code, count in Counter(codes).items() if count > 1] == []
    for digit, code, status, meaning, action in rows:
        assert code[3] == digit == status
        assert meaning.endswith(".")
        assert action


def test_first_digits_are_exit_codes(uses: list[Use]) -> None:
    """Of the class that the code is raised with; for codes that are passed on, of some class."""
    digits = {str(cls.exit_code) for cls in CLASSES.values()}
    assert digits == set("1234567")
    wrong = []
    for use in uses:
        name = RAISES.get(use.raised or "", use.raised)
        fits = use.code[3] == str(CLASSES[name].exit_code) if name else use.code[3] in digits
        if not fits:
            wrong.append(use)
    assert wrong == []


def test_codes_that_are_passed_on_are_few(uses: list[Use]) -> None:
    """Where the class cannot be read off the call: the seal's faults, and a code chosen in a line of its own."""
    places = {(use.code, use.file) for use in uses if use.raised is None}
    assert places == {
        *((code, "gora_serve/integrity/binding.py") for code in ("GS-102", "GS-103", "GS-104")),
        *((code, "gora_serve/integrity/headers.py") for code in ("GS-308", "GS-309")),
        *((code, "gora_serve/integrity/canonical.py") for code in ("GS-309", "GS-319")),
    }


def test_no_code_means_different_things_in_different_rooms(uses: list[Use]) -> None:
    rooms: dict[str, set[str]] = {}
    for use in uses:
        parts = use.file.split("/")
        rooms.setdefault(use.code, set()).add(parts[1] if len(parts) > 2 else parts[0])
    assert {code: found for code, found in rooms.items() if len(found) > 1} == {}


def strings_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_messages_name_commands_that_exist() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: gora-serve {word}"
        for path in source_files()
        for line, text in strings_of(path)
        for word in re.findall(r"gora-serve ([a-z]+)\b", text)
        if word not in cli.commands and "hint" in path.read_text().splitlines()[line - 1]
    ]
    assert wrong == []


def test_errors_documents_the_form_of_a_message() -> None:
    example = DOCUMENT.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    error = errors.InputError(
        "the file ends early: it was not downloaded whole", code="GS-306",
        file="base/model-00002-of-00002.safetensors", expected="100008 bytes", actual="99908 bytes",
        hint="download or copy the file again",
    )  # fmt: skip
    assert example.rstrip("\n") == str(error)


def test_every_error_says_what_to_do_next() -> None:
    """Or what is kept, where that is all there is to say."""
    silent = [
        f"{path.relative_to(REPOSITORY)}:{call.lineno}"
        for path in source_files()
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in CLASSES
        if not {word.arg for word in call.keywords} & {"hint", "kept", None}
    ]
    assert silent == []
