"""Tensors that stay in their safetensors files until they are asked for, one at a time.

Headers are checked strictly before anything is read; names, types and shapes are known without any tensor data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import safe_open
from torch import Tensor

from gora_serve.errors import InputError
from gora_serve.integrity.canonical import is_unicode
from gora_serve.integrity.headers import TensorEntry, read_header
from gora_serve.integrity.reading import unreadable

Value = TypeVar("Value")


def _check_path(path: Path) -> None:
    """Raise InputError (GS-3146) for a path that the safetensors library cannot open."""
    if not is_unicode(str(path.resolve())):
        raise InputError(
            "the path is not UTF-8, and the safetensors library opens no other", code="GS-3146", file=path,
            hint="rename the file or its folder",
        )  # fmt: skip


class TensorFiles(Mapping[str, Tensor]):
    """Tensor name -> tensor over one or several files. Each look-up reads that tensor anew and keeps nothing.

    entries: name -> type, shape and place. files: name -> the file that holds it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers. Raises InputError for a broken one, and for a name that two files hold (GS-344)."""
        self.entries: dict[str, TensorEntry] = {}
        self.files: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            _check_path(path)
            header = read_header(path)
            self.metadata |= header.metadata
            for name, entry in header.entries.items():
                if name in self.entries:
                    raise InputError(
                        "two files hold a tensor of this name", code="GS-344", file=path, tensor=name,
                        actual=self.files[name], hint="fetch the model again; one of the files is a leftover",
                    )  # fmt: skip
                self.entries[name], self.files[name] = entry, path

    def __getitem__(self, name: str) -> Tensor:
        path = self.files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except OSError as err:
            raise unreadable(path, err) from err
        except MemoryError:
            raise
        except Exception as err:  # SafetensorError; of the types that torch does not have, AttributeError and others
            raise InputError(
                "this tensor cannot be read", code="GS-3145", file=path, tensor=name,
                actual=f"{self.entries[name].dtype}: {str(err)[:80]}",
                hint="save the file again in float32; if something writes to it, run again when it is done",
            ) from err  # fmt: skip
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape


class Renamed(Mapping[str, Value]):
    """The values of a mapping under other names, read at each look-up as its own are."""

    def __init__(self, values: Mapping[str, Value], names: Mapping[str, str]) -> None:
        """names: what a value is called here -> what it is called in the mapping."""
        self._values, self._names = values, dict(names)

    def __getitem__(self, name: str) -> Value:
        return self._values[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Both(Mapping[str, Tensor]):
    """The tensors of two mappings, read at each look-up; the first one's where both have the name."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, name: str) -> Tensor:
        return self._first[name] if name in self._first else self._second[name]

    def __contains__(self, name: object) -> bool:
        return name in self._first or name in self._second

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._first, *self._second]))

    def __len__(self) -> int:
        return len(dict.fromkeys([*self._first, *self._second]))
