"""What changed in a watched directory: decisions from stamps and times alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gora_serve.serving.changes import NEVER, Tracked, forgotten, noticed, to_load, to_remove, tried

SETTLE = 1.0


def test_a_folder_is_read_once_it_has_stood_still() -> None:
    known = noticed({}, {"a": 1}, 10.0)
    assert to_load(known, 10.0, 0.0) == [], "one look is not enough, however short the wait"
    known = noticed(known, {"a": 1}, 10.5)
    assert to_load(known, 10.5, SETTLE) == []
    known = noticed(known, {"a": 1}, 11.0)
    assert to_load(known, 11.0, SETTLE) == ["a"]
    known = tried(known, "a")
    assert to_load(noticed(known, {"a": 1}, 99.0), 99.0, SETTLE) == [], "neither served nor refused twice"


def test_an_upload_that_goes_on_is_not_read() -> None:
    known: Mapping[str, Tracked] = {}
    for size in range(50):
        now = 10.0 + 0.9 * size
        known = noticed(known, {"a": size}, now)
        assert to_load(known, now, SETTLE) == []
    assert to_load(noticed(known, {"a": 49}, now + SETTLE), now + SETTLE, SETTLE) == ["a"]


def test_what_is_tried_again_without_a_change() -> None:
    known = tried(noticed({}, {"a": 1}, 0.0), "a", again=60.0)
    assert to_load(known, 59.9, SETTLE) == []
    assert to_load(known, 60.0, SETTLE) == ["a"]
    changed = noticed(known, {"a": 2}, 61.0)
    assert to_load(changed, 61.5, SETTLE) == [], "a change has to stand still, too"
    assert changed["a"].again == NEVER


def test_a_folder_that_is_replaced_is_not_withdrawn() -> None:
    known = tried(noticed({}, {"a": 1}, 0.0), "a")
    known = noticed(known, {}, 5.0)
    assert to_remove(known, {"a"}, 5.0, SETTLE) == []
    known = noticed(known, {"a": 2}, 5.5)
    assert to_remove(known, {"a"}, 50.0, SETTLE) == []
    known = noticed(known, {}, 60.0)
    assert to_remove(known, {"a"}, 61.0, SETTLE) == ["a"]
    assert to_remove(known, set(), 61.0, SETTLE) == []


def test_what_is_gone_is_forgotten_unless_it_is_served() -> None:
    known = noticed(noticed({}, {"a": 1, "b": 1}, 0.0), {}, 1.0)
    assert set(forgotten(known, {"a"})) == {"a"}
    back = noticed(forgotten(known, {"a"}), {"b": 1}, 2.0)
    assert to_load(back, 3.0, SETTLE) == ["b"], "it is read again when it comes back, also unchanged"


looks = st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), max_size=3), max_size=12)


@pytest.mark.parametrize("settle", [1.0, 3.0])
@given(looks=looks)
def test_in_the_end_all_that_is_there_was_read_as_it_stands(looks: list[dict[str, int]], settle: float) -> None:
    """Whatever happened before: once the directory stands still, each name's last stamp is read, once."""
    known: Mapping[str, Tracked] = {}
    read: list[tuple[str, int]] = []
    served: set[str] = set()
    for now, seen in enumerate([*looks, *[looks[-1] if looks else {}] * 5]):
        known = noticed(known, seen, float(now))
        for name in to_remove(known, served, now, settle):
            served.remove(name)
        for name in to_load(known, now, settle):
            read.append((name, seen[name]))
            served.add(name)
            known = tried(known, name)
        known = forgotten(known, served)
        assert to_load(known, now, settle) == []
    last = looks[-1] if looks else {}
    assert served == set(last)
    assert all((name, stamp) in read for name, stamp in last.items())
