"""What a watched directory tells the server of its adapters, for /metrics and `gora-serve status`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gora_serve.serving.ledger import Ledger
from serving.corpus import CORPUS
from serving.test_live_folder import Place, drop, make, place, served_base

__all__ = ["make", "place", "served_base"]
NAN = next(row for row in CORPUS if row.name == "NaN")


@pytest.fixture
def told(place: Place, tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """What the ledger says."""
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.serves("base", [])
    place.live._ledger = ledger

    def read() -> dict[str, Any]:
        value: dict[str, Any] = json.loads(ledger.file.read_text())
        return value

    return read


def test_the_life_of_an_adapter(
    place: Place, make: Callable[..., Path], told: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    sound = make("sound")
    folder = drop(place, sound, "a")
    place.wait()
    served = told()["models"]["a"]
    assert served["root"].startswith("gb1:sha256:")
    assert (served["kind"], served["rank"]) == ("adapter", 4)
    assert {"since", "verify_seconds", "load_seconds"} <= served.keys()
    broken = NAN.build(sound, tmp_path / "broken")
    shutil.rmtree(folder)
    shutil.copytree(broken, folder)
    assert place.refused() == {"a": NAN.code}
    assert told()["failures"] == {"a": 1}
    assert told()["models"]["a"]["error"].startswith(f"[{NAN.code}]")
    assert told()["models"]["a"]["root"] == served["root"], "the older version goes on being served"
    shutil.rmtree(folder)
    drop(place, sound, "a")
    place.wait()
    assert "error" not in told()["models"]["a"]
    shutil.rmtree(folder)
    place.wait()
    assert set(told()["models"]) == {"base"}


def test_a_name_that_was_never_served(
    place: Place, make: Callable[..., Path], told: Callable[[], dict[str, Any]]
) -> None:
    NAN.build(make("sound"), place.folder / "bad")
    assert place.refused() == {"bad": NAN.code}
    assert told()["failures"] == {"bad": 1}
    assert told()["refused"]["bad"].startswith(f"[{NAN.code}]")
    assert set(told()["models"]) == {"base"}
    shutil.rmtree(place.folder / "bad")
    place.wait()
    assert (told()["failures"], told()["refused"]) == ({"bad": 1}, {})


def test_a_folder_with_the_name_of_the_base_is_no_error_of_the_base(
    place: Place, make: Callable[..., Path], told: Callable[[], dict[str, Any]]
) -> None:
    drop(place, make("sound"), "base")
    assert place.refused() == {"base": "GS-282"}
    assert "error" not in told()["models"]["base"]
    assert told()["refused"] == {"base": "[GS-282] another model has this name"}


def test_a_full_disk_ends_no_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "gone" / "ledger.json")
    ledger.serves("base", [])
    assert "not up to date" in caplog.text
    ledger.file.parent.mkdir()
    ledger.ready()
    assert json.loads(ledger.file.read_text())["models"]["base"]["kind"] == "base", "the next change writes all of it"
