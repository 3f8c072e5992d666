"""The rooms of gora_serve and the arrows between them, read from the source: who may import whom, and what.

A file imports from its own room and from rooms above it in `ROOMS`; imports for type checkers do not count there. No
two files import each other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("gora_serve", "converters")

# From the top down. The package's own __init__ holds the version and nothing else.
ROOMS = (
    "root",
    "integrity",
    "adapter",
    "gora",
    "deploy",
    "training",
    "serving",
    "vllm_plugin",
    "flow",
    "report",
    "cli",
)
ROOT_FILES = (
    "gora_serve/__init__.py",
    "gora_serve/errors.py",
    "gora_serve/config.py",
    "gora_serve/container.py",
    "gora_serve/fit_options.py",
    "gora_serve/progress.py",
    "gora_serve/signals.py",
)
FLOW_FILES = (
    "gora_serve/pictures.py",
    "gora_serve/demo.py",
    "gora_serve/bind.py",
    "gora_serve/doctor.py",
    "gora_serve/inspect.py",
    "gora_serve/capacity.py",
    "gora_serve/parity.py",
)  # whole flows, which commands call

# What a room may import at module level beside the standard library; a file's own line replaces that of its room.
MODULE_LEVEL: Mapping[str, frozenset[str]] = {
    "root": frozenset(),
    "integrity": frozenset(),
    "adapter": frozenset({"torch", "safetensors"}),
    "gora_serve/adapter/engine_ranks.py": frozenset(),
    "gora_serve/adapter/names.py": frozenset(),
    "gora_serve/adapter/peft_config.py": frozenset(),
    "gora": frozenset({"torch"}),
    "gora_serve/gora/ranks.py": frozenset(),
    "gora_serve/gora/gamma.py": frozenset(),
    "gora_serve/gora/settle.py": frozenset(),
    "deploy": frozenset({"torch", "safetensors", "numpy"}),
    "training": frozenset(
        {"torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "psutil", "numpy"}
    ),
    "gora_serve/training/run_files.py": frozenset(),  # what `ranks` needs, without torch
    "gora_serve/training/selection.py": frozenset(),  # what `plan` needs, without torch
    "gora_serve/training/shapes.py": frozenset(),
    "gora_serve/training/activations.py": frozenset(),
    "gora_serve/training/memory.py": frozenset(),
    "gora_serve/training/autocast.py": frozenset(),
    "gora_serve/training/advice.py": frozenset(),
    "serving": frozenset(),
    "vllm_plugin": frozenset({"torch", "vllm"}),
    "flow": frozenset(),
    "report": frozenset(),
    "cli": frozenset({"click"}),
    "gora_serve/cli/tables.py": frozenset({"rich"}),
    "gora_serve/cli/render_fit.py": frozenset({"rich"}),
    "gora_serve/cli/render_serve.py": frozenset({"rich"}),
    "gora_serve/cli/render_plan.py": frozenset({"rich"}),
    "gora_serve/cli/render_convert.py": frozenset({"rich"}),
    "gora_serve/cli/render_merge.py": frozenset({"rich"}),
    "gora_serve/cli/render_combine.py": frozenset({"rich"}),
    "gora_serve/cli/render_gap.py": frozenset({"rich"}),
    "gora_serve/cli/render_doctor.py": frozenset({"rich"}),
    "gora_serve/cli/render_inspect.py": frozenset({"rich"}),
    "gora_serve/cli/render_hub.py": frozenset({"rich"}),
    "gora_serve/cli/render_slots.py": frozenset({"rich"}),
    "gora_serve/cli/render_status.py": frozenset({"rich"}),
    "converters": frozenset({"torch", "safetensors"}),
}
# What may be imported inside functions beyond that.
INSIDE: Mapping[str, frozenset[str]] = {
    "gora_serve/integrity/hub.py": frozenset({"huggingface_hub"}),  # only where something is a hub id
    "gora_serve/integrity/snapshots.py": frozenset({"huggingface_hub"}),
    "gora_serve/integrity/push.py": frozenset({"huggingface_hub"}),
    "gora_serve/deploy/gguf_file.py": frozenset({"gguf"}),
    "gora_serve/deploy/gguf_names.py": frozenset({"gguf"}),
    "gora_serve/serving/inside.py": frozenset({"vllm"}),  # in the engine's process, never in ours
    "gora_serve/serving/vllm_cli.py": frozenset({"vllm"}),  # is the engine's process, never ours
    "gora_serve/serving/metrics.py": frozenset({"prometheus_client"}),  # in the engine's process, never in ours
    "gora_serve/training/encode.py": frozenset({"jinja2"}),  # the errors of transformers' chat templates
    "gora_serve/training/quantize.py": frozenset({"bitsandbytes"}),
    "gora_serve/cli/watching.py": frozenset({"rich"}),  # 30 ms, of what shows bars alone
    "gora_serve/pictures.py": frozenset({"matplotlib"}),
    "gora_serve/demo.py": frozenset({"torch"}),  # asks for a GPU
    "gora_serve/parity.py": frozenset({"torch"}),  # names a dtype
}
# Modules that never bring torch with them, through whatever they import.
LIGHT = (
    "root",
    "integrity",
    "serving",
    "flow",
    "report",
    "cli",
    *(name for name in MODULE_LEVEL if name.endswith(".py")),
)
CLOSED_TO_GORA = {"os", "io", "pathlib", "json", "shutil", "tempfile"}  # the maths knows no disk
ASKS_CONVERTERS = {"convert", "gap", "merge", "_into_model", "_into_adapter", "_verify_merge"}
# The functions of commands that may import converters.


@dataclass(frozen=True)
class Import:
    """One import: the file, the module that it names, the function that holds it (None at module level)."""

    file: str
    module: str
    line: int
    function: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path, file: str, known: frozenset[str]) -> list[Import]:
    """Every import of a file outside of TYPE_CHECKING. `known`: our modules, to tell modules from names."""
    found: list[Import] = []

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other, function)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = function or getattr(node, "name", "lambda")
        for module in _named(node, file, known):
            found.append(Import(file, module, node.lineno, function))  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text(encoding="utf-8")), None)
    return found


def _named(node: ast.AST, file: str, known: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
        assert node.module is not None
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if name in known else node.module for name in inner)


def files_of(root: Path) -> list[str]:
    found = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(file: str) -> str:
    if file.startswith("converters/"):
        return "converters"
    if file in ROOT_FILES:
        return "root"
    if file in FLOW_FILES:
        return "flow"
    if file == "gora_serve/__main__.py":
        return "cli"
    return file.split("/")[1]


def all_imports(root: Path) -> list[Import]:
    files = files_of(root)
    known = frozenset(module_of(file) for file in files)
    return [one for file in files for one in imports_of(root / file, file, known)]


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def arrow_faults(root: Path) -> list[str]:
    """Imports of ours that point upwards in the table."""
    places = {module_of(file): room_of(file) for file in files_of(root)}
    faults = []
    for one in all_imports(root):
        if not is_ours(one.module):
            continue
        here, there = room_of(one.file), places.get(one.module)
        if there is None:
            faults.append(f"{one}, which is not there")
        elif there == "converters" and here != "converters":
            if not (here == "cli" and one.function in ASKS_CONVERTERS):
                faults.append(str(one))
        elif here != "converters" and ROOMS.index(there) > ROOMS.index(here):
            faults.append(f"{one}: {here} is above {there}")
    return faults


def package_faults(root: Path) -> list[str]:
    """Imports of packages, at module level or inside functions, that the tables do not name."""
    faults = []
    for one in all_imports(root):
        package = one.module.split(".")[0]
        room = room_of(one.file)
        if is_ours(one.module):
            continue
        if package in sys.stdlib_module_names:
            if room == "gora" and package in CLOSED_TO_GORA:
                faults.append(str(one))
            continue
        allowed = MODULE_LEVEL.get(one.file, MODULE_LEVEL[room])
        if one.function is not None:
            allowed = MODULE_LEVEL[room] | INSIDE.get(one.file, frozenset())
        if package not in allowed:
            faults.append(str(one))
    return faults


def module_level_graph(root: Path) -> dict[str, dict[str, str]]:
    """Our module -> (module that importing it runs -> the line that says so), parents included."""
    known = {module_of(file): file for file in files_of(root)}
    graph: dict[str, dict[str, str]] = {module: {} for module in known}
    for one in all_imports(root):
        if one.function is None:
            parts = one.module.split(".")
            names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            graph[module_of(one.file)] |= {name: str(one) for name in names if not is_ours(name) or name in known}
    return graph


def paths_to(graph: Mapping[str, Mapping[str, str]], start: str, package: str) -> list[str] | None:
    """The chain of module-level imports by which `start` brings `package`, or None."""
    seen, open_ = {start}, [(start, [])]  # type: ignore[var-annotated]
    while open_:
        module, chain = open_.pop()
        for target, line in graph.get(module, {}).items():
            if target == package:
                return [*chain, line]
            if target not in seen:
                seen.add(target)
                open_.append((target, [*chain, line]))
    return None


def circles(root: Path) -> list[str]:
    """Files that import each other by statements at whatever place: inside functions and for type checkers too.

    A package's own file is imported with each of its modules, and may import them.
    """
    files = files_of(root)
    known = frozenset(module_of(file) for file in files)
    graph: dict[str, set[str]] = {}
    for file in files:
        tree, module = ast.parse((root / file).read_text(encoding="utf-8")), module_of(file)
        named = {name for node in ast.walk(tree) for name in _named(node, file, known)}
        parts = [name.split(".") for name in named]
        named |= {".".join(part[:end]) for part in parts for end in range(1, len(part))}
        graph[module] = {name for name in named if name in known and not f"{module}.".startswith(f"{name}.")}
    state: dict[str, int] = {}
    found: list[str] = []

    def walk(module: str, chain: tuple[str, ...]) -> None:
        if state.get(module) == 1 and module in chain:
            found.append(" -> ".join([*chain[chain.index(module) :], module]))
        if module in state:
            return
        state[module] = 1
        for target in sorted(graph.get(module, ())):
            walk(target, (*chain, module))
        state[module] = 2

    for module in sorted(graph):
        walk(module, ())
    return found


def is_light(file: str) -> bool:
    return file in LIGHT or room_of(file) in LIGHT


# The rules, on our own source


def test_every_file_lies_in_a_room() -> None:
    assert {room_of(file) for file in files_of(REPOSITORY)} <= {*ROOMS, "converters"}
    assert set(MODULE_LEVEL) >= {*ROOMS, "converters"}
    named = {name for name in (*MODULE_LEVEL, *INSIDE, *ROOT_FILES, *FLOW_FILES) if name.endswith(".py")}
    assert named <= set(files_of(REPOSITORY)), "the tables name files that are gone"


def test_arrows_point_down_the_table() -> None:
    assert arrow_faults(REPOSITORY) == []


def test_packages_are_imported_where_the_table_says_so() -> None:
    assert package_faults(REPOSITORY) == []


def test_no_circles() -> None:
    assert circles(REPOSITORY) == []


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate", "peft", "datasets", "vllm", "safetensors"])
def test_light_modules_stay_light(package: str) -> None:
    """Not even through another module of ours: help, `ranks`, `hash`, `verify` and `--dry-run` stay instant."""
    graph = module_level_graph(REPOSITORY)
    light = [module_of(file) for file in files_of(REPOSITORY) if is_light(file)]
    assert len(light) > 30
    chains = {module: paths_to(graph, module, package) for module in light}
    assert {module: chain for module, chain in chains.items() if chain} == {}


# The rules can fail


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository in small that keeps every rule."""
    for file, text in {
        "gora_serve/__init__.py": "",
        "gora_serve/errors.py": "import json\n",
        "gora_serve/integrity/__init__.py": "",
        "gora_serve/integrity/files.py": "from gora_serve.errors import GoraError\n",
        "gora_serve/gora/__init__.py": "",
        "gora_serve/gora/ranks.py": "import math\n",
        "gora_serve/gora/initialize.py": "import torch\nfrom gora_serve.gora import ranks\n",
        "gora_serve/cli/__init__.py": "",
        "gora_serve/cli/main.py": (
            "import click\nfrom typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    import torch\n    import converters\n"
            "def convert():\n    import converters.peft\n    from gora_serve.gora import initialize\n"
        ),
        "converters/__init__.py": "",
        "converters/peft.py": "import torch\nfrom gora_serve.gora.ranks import RankPlan\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def test_a_tree_that_keeps_the_rules(tree: Path) -> None:
    assert (arrow_faults(tree), package_faults(tree), circles(tree)) == ([], [], [])


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("gora_serve/integrity/files.py", "from gora_serve.gora.ranks import RankPlan", "integrity is above gora"),
        ("gora_serve/integrity/files.py", "def f():\n    import gora_serve.cli.main", "integrity is above cli"),
        ("gora_serve/errors.py", "from gora_serve.integrity import files", "root is above integrity"),
        ("gora_serve/cli/main.py", "def fit():\n    import converters.peft", "imports converters.peft"),
        ("gora_serve/cli/main.py", "import converters", "imports converters"),
        ("gora_serve/gora/ranks.py", "import gora_serve.nowhere", "not there"),
    ],
)
def test_wrong_arrows_are_found(tree: Path, file: str, text: str, named: str) -> None:
    (tree / file).write_text(text + "\n")
    (fault,) = arrow_faults(tree)
    assert fault.startswith(file)
    assert named in fault


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("gora_serve/gora/ranks.py", "import torch"),
        ("gora_serve/gora/ranks.py", "def f():\n    import transformers"),
        ("gora_serve/gora/initialize.py", "from pathlib import Path"),
        ("gora_serve/integrity/files.py", "try:\n    import safetensors\nexcept ImportError:\n    pass"),
        ("gora_serve/cli/main.py", "import rich.table"),
        ("gora_serve/errors.py", "class A:\n    import click"),
    ],
)
def test_wrong_packages_are_found(tree: Path, file: str, text: str) -> None:
    (tree / file).write_text(text + "\n")
    (fault,) = package_faults(tree)
    assert fault.startswith(file)


@pytest.mark.parametrize("place", ["", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    ", "def f():\n    "])
def test_circles_are_found_wherever_they_are_closed(tree: Path, place: str) -> None:
    (tree / "gora_serve/gora/ranks.py").write_text(f"{place}from gora_serve.gora.initialize import draw\n")
    (circle,) = circles(tree)
    assert set(circle.split(" -> ")) == {"gora_serve.gora.initialize", "gora_serve.gora.ranks"}


def test_a_circle_through_a_package_is_found(tree: Path) -> None:
    (tree / "gora_serve/gora/__init__.py").write_text("from gora_serve.integrity.files import FILES\n")
    (tree / "gora_serve/integrity/files.py").write_text("from gora_serve.gora.ranks import RankPlan\n")
    (circle,) = circles(tree)
    assert set(circle.split(" -> ")) == {"gora_serve.gora", "gora_serve.integrity.files"}


def test_heavy_chains_are_found(tree: Path) -> None:
    (tree / "gora_serve/gora/ranks.py").write_text("from gora_serve.gora.initialize import draw\n")
    chain = paths_to(module_level_graph(tree), "gora_serve.gora.ranks", "torch")
    assert chain is not None
    assert len(chain) == 2
