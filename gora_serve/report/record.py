"""JSON that another version, a hand or an enemy may have written, asked value by value; errors name file and key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gora_serve.errors import InputError

LARGEST = 2.0**53


@dataclass(frozen=True)
class Record:
    """An object of a JSON file. `path`: where in the file it stands, for messages. Absent and null are both None."""

    value: Mapping[str, Any]
    file: Path
    path: str = ""

    def part(self, name: str) -> Record:
        """Return the object under that key, an empty one where there is none."""
        found = self._find(name, dict, "an object")
        return Record(found or {}, self.file, self._name(name))

    def parts(self, name: str) -> Iterator[tuple[str, Record]]:
        """Yield every key of the object under `name`, with its object."""
        inner = self.part(name)
        for key in inner.value:
            yield key, inner.part(key)

    def items(self, name: str) -> list[Record]:
        """Return the objects of the list under that key."""
        found = self._find(name, list, "a list") or []
        return [
            Record({"": one}, self.file, f"{self._name(name)}[{index}]").part("") for index, one in enumerate(found)
        ]

    def text(self, name: str) -> str | None:
        found: str | None = self._find(name, str, "a text")
        return found

    def flag(self, name: str) -> bool | None:
        found: bool | None = self._find(name, bool, "true or false")
        return found

    def number(self, name: str) -> float | None:
        """Return a number below 2^53, as the file has it."""
        found = self.value.get(name)
        if found is not None and (
            isinstance(found, bool) or not isinstance(found, int | float) or abs(found) > LARGEST
        ):
            raise self.malformed(name, "a number", found)
        return found

    def whole(self, name: str) -> int | None:
        """Return a whole number that is not negative."""
        found = self.value.get(name)
        if found is not None and (type(found) is not int or not 0 <= found <= LARGEST):
            raise self.malformed(name, "a whole number", found)
        return found

    def numbers(self) -> dict[str, float]:
        """Return every value of this object, numbers all; null ones are left out."""
        found = {name: self.number(name) for name in self.value}
        return {name: value for name, value in found.items() if value is not None}

    def texts(self) -> dict[str, str]:
        """Return every value of this object, texts all; null ones are left out."""
        found = {name: self.text(name) for name in self.value}
        return {name: value for name, value in found.items() if value is not None}

    def malformed(self, name: str, expected: str, actual: object) -> InputError:
        return InputError(
            f"{self._name(name) or 'this'} is not what a run has there", code="GS-3380", file=self.file,
            expected=expected, actual=repr(actual)[:80], hint="take the file as fit or gap wrote it",
        )  # fmt: skip

    def _find(self, name: str, kind: type, expected: str) -> Any:
        found = self.value.get(name)
        if found is not None and not isinstance(found, kind):
            raise self.malformed(name, expected, found)
        return found

    def _name(self, name: str) -> str:
        return ".".join(part for part in (self.path, name) if part)
