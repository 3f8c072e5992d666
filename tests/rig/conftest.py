"""One world of inputs for the whole room, and the doors to the tools beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training")]

from world import Bench, Command, World, build_world, commands  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("rig") / "world")


@pytest.fixture(scope="session")
def benches(world: World) -> dict[str, Bench]:
    """Made when they are first asked for."""
    return _Benches(world)


class _Benches(dict[str, Bench]):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __missing__(self, name: str) -> Bench:
        fresh = " fresh" in name
        command = name.partition(" fresh" if fresh else " --overwrite")[0]
        found: Command = next(one for one in commands() if one.name == command)
        self[name] = Bench(self.world, found, over=not fresh, exchange="without" not in name)
        return self[name]
