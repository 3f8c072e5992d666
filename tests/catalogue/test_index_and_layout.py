"""Faults 23 to 32: the index of a sharded base, and where its files lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from catalogue.conftest import INDEX, SINGLE, Place

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
HEAD = "lm_head.weight"


def index_of(place: Place) -> dict[str, str]:
    return dict(json.loads((place.base / INDEX).read_text())["weight_map"])


def write_index(place: Place, placed: object) -> None:
    (place.base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.mark.parametrize("how", ["..", "absolute", "symlink"])
def test_paths_that_leave_the_folder(place: Place, how: str, events: Callable[..., list[tuple[object, ...]]]) -> None:
    """23: nothing outside is opened."""
    outside = place.folder / "outside.safetensors"
    shutil.copy(place.base / FIRST, outside)
    name = {"..": "../outside.safetensors", "absolute": str(outside), "symlink": "link.safetensors"}[how]
    if how == "symlink":
        (place.base / name).symlink_to(outside)
    write_index(place, index_of(place) | {HEAD: name})
    place.run("--version")
    seen = len(events("open"))
    for words in (("hash", place.base), place.serve()):
        place.refuses(words, 3, "GS-325", name, file=place.base)
    opened = [str(args[0]) for args in events("open")][seen:]
    assert any(path.endswith(INDEX) for path in opened)
    assert not [path for path in opened if path.endswith((outside.name, "link.safetensors"))]


def test_missing_shards(place: Place) -> None:
    """24: all of them are named, not the first alone."""
    (place.base / FIRST).unlink()
    (place.base / SECOND).unlink()
    place.refuses(("hash", place.base), 5, "GS-504", "2 of 2", FIRST, SECOND, file=place.base)


def test_the_index_names_a_tensor_that_its_shard_lacks(place: Place) -> None:
    """25."""
    write_index(place, index_of(place) | {"model.phantom.weight": SECOND})
    place.refuses(("hash", place.base), 3, "GS-326", file=place.base / SECOND, tensor="model.phantom.weight")


def test_a_shard_holds_a_tensor_that_the_index_omits(place: Place) -> None:
    """26."""
    placed = index_of(place)
    file = placed.pop(HEAD)
    write_index(place, placed)
    place.refuses(("hash", place.base), 3, "GS-327", file=place.base / file, tensor=HEAD)


def test_one_tensor_in_two_shards(place: Place) -> None:
    """27: both files are named."""
    held = index_of(place)[HEAD]
    other = place.base / (SECOND if held == FIRST else FIRST)
    save_file(load_file(other) | {HEAD: np.zeros((384, 32), np.float32)}, other)
    place.refuses(("hash", place.base), 3, "GS-328", FIRST, SECOND, file=place.base, tensor=HEAD)


@pytest.mark.parametrize(
    ("content", "gs", "mention"),
    [
        ('{"weight_map": ' + "[" * 100_000, "GS-320", "64 levels"),
        ('{"weight_map": {"a": NaN}}', "GS-319", "NaN"),
        (None, "GS-318", str(64 << 20)),
    ],
    ids=["deep", "NaN", "200 MB"],
)
def test_an_index_that_is_no_index(place: Place, content: str | None, gs: str, mention: str) -> None:
    """28: refused by its size before a byte is read, by its depth, by its numbers."""
    file = place.base / INDEX
    if content is None:
        file.unlink()
        with file.open("wb") as stream:
            stream.truncate(200 << 20)  # takes no room
    else:
        file.write_text(content)
    place.refuses(("hash", place.base), 3, gs, mention, file=file)


def test_a_stale_index_beside_a_single_file(place: Place) -> None:
    """29: readers differ in which of the two they take, so that neither is: refused, also where both are the same."""
    tensors = {name: value for shard in place.base.glob("model-*") for name, value in load_file(shard).items()}
    place.before = None
    save_file(tensors, place.base / SINGLE)
    place.refuses(("hash", place.base), 3, "GS-3290", "model-00001", file=place.base)


def test_a_loop_of_symlinks(place: Place) -> None:
    """31."""
    (place.base / FIRST).unlink()
    (place.base / FIRST).symlink_to(place.base / "other.safetensors")
    (place.base / "other.safetensors").symlink_to(place.base / FIRST)
    place.refuses(("hash", place.base), 3, "GS-325", "loop", file=place.base / FIRST)


def test_a_blob_that_was_replaced(place: Place) -> None:
    """32: the name of a blob in the hub's cache is the digest that the hub promised."""
    import hashlib

    repository = place.folder / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(place.base / "config.json", snapshot)
    tensors = {name: value for shard in place.base.glob("model-*") for name, value in load_file(shard).items()}
    save_file(tensors, blobs / "whole")
    promised = hashlib.sha256((blobs / "whole").read_bytes()).hexdigest()
    (blobs / "whole").rename(blobs / promised)
    (snapshot / SINGLE).symlink_to(Path("../../blobs") / promised)
    place.accepts("hash", snapshot)
    place.before = None
    raw = bytearray((blobs / promised).read_bytes())
    raw[-1] ^= 1
    (blobs / promised).write_bytes(raw)
    actual = hashlib.sha256(raw).hexdigest()
    place.refuses(("hash", snapshot), 1, "GS-105", "download", file=blobs / promised, expected=promised, actual=actual)
