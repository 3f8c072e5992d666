"""Every error that gora-serve raises on purpose, one class for each thing that the user can do about it.

    GoraError
    ├── MismatchError    1   the check ran, and the answer is no
    ├── UsageError       2   call the command differently
    ├── InputError       3   this file or value is refused
    ├── BindingError     4   the parts do not belong together
    ├── MachineError     5   disk, permission, missing file, network
    ├── OutputError      6   the output exists, or another process holds it
    └── RunError         7   training or the engine failed

The number is the exit code of the command line. Each place that raises has a stable `GS-nnn` code, documented in
docs/errors.md; its first digit is the class's exit code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self


def printable(text: object) -> str:
    r"""Return `text` with control characters shown as \xNN, so that no name out of a file can drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(err: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def counted(number: int, one: str, more: str = "") -> str:
    """Return "1 row", "2 rows"; `more`: the words for several, where they are not those for one with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def listed(names: Iterable[str], shown: int = 5, *, between: str = ", ") -> str:
    """Return the first `shown` names, and how many more there are: "a, b and 7 more"."""
    every = list(names)
    more = f" and {len(every) - shown:,} more" if len(every) > shown else ""
    return between.join(every[:shown]) + more


class GoraError(Exception):
    """What happened, where, what was expected, what to do next.

    `code` is the stable "GS-nnn"; `hint` is printed as the `try:` line. `kept` says what state the output is in.
    `faults`: where one error stands for several, each of them in a line of its own.
    """

    exit_code = 70

    def __init__(
        self,
        what: str,
        *,
        code: str,
        file: str | Path | None = None,
        tensor: str | None = None,
        expected: object = None,
        actual: object = None,
        kept: str | None = None,
        hint: str | None = None,
        faults: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.faults = tuple(faults)
        self.code = code
        self.fields: Mapping[str, object] = {
            name: value
            for name, value in {
                "file": file, "tensor": tensor, "expected": expected, "actual": actual, "kept": kept, "try": hint,
            }.items()
            if value is not None
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"error[{self.code}] {printable(self.what)}"]
        lines += [f"  fault: {printable(fault)}" for fault in self.faults]
        lines += [f"  {name}: {printable(value)}" for name, value in self.fields.items()]
        return "\n".join(lines)

    def keeping(self, kept: str, *, hint: str | None = None) -> Self:
        """Return the same error with another `kept`, and `hint` if given, for a caller that knows what is left."""
        return self._again(self.what, {"kept": kept} | ({"try": hint} if hint else {}))

    def naming(self, file: Path) -> Self:
        """Return the same error with the file, where it has none, for a caller that knows it."""
        return self._again(self.what, {"file": self.fields.get("file", file)})

    def advising(self, hint: str) -> Self:
        """Return the same error with another next step, for a caller that knows a better one."""
        return self._again(self.what, {"try": hint})

    def saying(self, what: str) -> Self:
        """Return the same error with another first line, for a caller that knows more of it."""
        return self._again(what, {})

    def _again(self, what: str, changes: Mapping[str, object]) -> Self:
        fields = {"hint" if name == "try" else name: value for name, value in {**self.fields, **changes}.items()}
        return type(self)(what, code=self.code, faults=self.faults, **fields)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, object]:
        """Return the same fields for `--json`."""
        fields = {name: printable(value) for name, value in self.fields.items()}
        several = {"faults": [printable(fault) for fault in self.faults]} if self.faults else {}
        return {"error": {"code": self.code, "what": self.what, **several, **fields}, "exit_code": self.exit_code}


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked the work to stop, and it stopped at a safe point. No error: `str` says what is kept."""

    def __init__(self, what: str, *, number: int, kept: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.number, self.kept, self.hint = what, number, kept, hint

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        lines = [printable(self.what), f"  kept: {printable(self.kept)}"]
        return "\n".join([*lines, f"  try: {printable(self.hint)}"] if self.hint else lines)


class MismatchError(GoraError):
    """The check ran and the bytes differ."""

    exit_code = 1


class UsageError(GoraError):
    """The command or function was called with values that make no sense together."""

    exit_code = 2


class InputError(GoraError):
    """A file is malformed, hostile or unsupported."""

    exit_code = 3


class BindingError(GoraError):
    """Base, adapter, configuration or engine do not belong together."""

    exit_code = 4


class MachineError(GoraError):
    """The environment: disk, permission, missing file, network, missing package."""

    exit_code = 5


class OutputError(GoraError):
    """The output exists already, or another process is writing it."""

    exit_code = 6


class RunError(GoraError):
    """Training or serving failed on the way."""

    exit_code = 7
